"""Studies, one file per question: a command, a table, a figure, results as JSON."""
