"""Runnable experiments on lorax: imports `lorax`, is never imported by it."""
