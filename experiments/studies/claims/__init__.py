"""Studies of one claim of a paper each, on problems where it can be decided."""
