"""Optimisers: optax gradient transformations over adapter trees."""
