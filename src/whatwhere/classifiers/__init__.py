"""WHAT: networks, where they are split, and what belongs to their weights."""
