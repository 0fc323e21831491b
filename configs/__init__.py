"""Experiment configurations: one file per experiment, each a lab record."""
