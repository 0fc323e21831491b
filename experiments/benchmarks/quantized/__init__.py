"""Bases in a few bits a weight: what they cost, and what they lose."""
