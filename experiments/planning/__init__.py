"""Compiling a train step for machines that are not there, and what that tells."""
