"""Is the where true: tallies of what maps say against what is there."""
