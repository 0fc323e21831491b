"""Studies of one paper's claim each, on problems where it can be decided."""
