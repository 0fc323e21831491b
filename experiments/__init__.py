"""Experiments on lorax: the files here are commands, the rooms what they call."""
