"""Generating models: loading them, continuing texts, and exporting trained ones."""
