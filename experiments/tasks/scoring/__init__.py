"""Scores of texts and of labels, each in its own file."""
