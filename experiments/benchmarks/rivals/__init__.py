"""Other frameworks on the same task, and whether all of them compute the same."""
