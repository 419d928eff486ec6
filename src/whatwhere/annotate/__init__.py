"""A source of any size -> rows, a region each, that are written once and never lost."""
