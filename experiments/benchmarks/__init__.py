"""Benchmarks whose figures the README quotes, each with the command that runs it."""
