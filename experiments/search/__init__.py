"""A grid over the fields of a config: its runs, their processes, their table."""
