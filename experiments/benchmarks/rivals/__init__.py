"""Other frameworks at the same task, and whether all compute the same."""
