"""Whole runs, a page each, read downwards: from a config to files in a workdir."""
