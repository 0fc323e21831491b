"""Quantised bases: what they cost, and what they lose."""
