"""Whole runs, each one file to read from top to bottom: from a config to a workdir."""
