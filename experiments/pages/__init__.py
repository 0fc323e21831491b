"""Pages that are drawn of runs."""
