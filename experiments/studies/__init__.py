"""Questions, one file each: a command, a table, a figure, results as JSON."""
