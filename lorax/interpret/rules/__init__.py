"""The rules, a file for each family of primitives; importing them registers them."""

from lorax.interpret.rules import (
    control,
    custom,
    gather,
    joins,
    products,
    scales,
    slices,
    views,
)

__all__ = [
    "control",
    "custom",
    "gather",
    "joins",
    "products",
    "scales",
    "slices",
    "views",
]
