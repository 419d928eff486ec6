"""Programs: they parse, call and print, and compute nothing."""
