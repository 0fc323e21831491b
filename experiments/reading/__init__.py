"""Turns what was typed into a config that a run can finish: flags, fields, plugins."""
