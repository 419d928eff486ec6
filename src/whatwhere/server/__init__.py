"""A classifier that answers over HTTP."""
