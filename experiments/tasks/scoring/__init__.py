"""Scores of texts and of labels, each in a file of its own."""
