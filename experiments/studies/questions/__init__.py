"""The questions, one file each: its arms, its panels, its notes."""
