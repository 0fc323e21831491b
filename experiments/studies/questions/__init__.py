"""The questions, one file each with its arms, panels and notes."""
