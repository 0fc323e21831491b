"""Experiments on lorax: the files here are commands, the folders what they call."""
