"""What every law refuses, where its arguments can be seen."""

from __future__ import annotations

from typing import Any

import jax

Number = Any
"""A Python number or a scalar array, traced or not."""


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raises ValueError for a value that is not among the known ones."""
    if value not in known:
        raise ValueError(f"{name}={value!r}; choose one of {', '.join(known)}")


def require_positive(**numbers: Number) -> None:
    """Raises ValueError for what is not positive, where it can be seen."""
    for name, value in numbers.items():
        if not isinstance(value, jax.core.Tracer) and not value > 0:
            raise ValueError(f"{name}={value}; give a number > 0")


def require_at_least_0(**numbers: Number) -> None:
    """Raises ValueError for what is negative, where it can be seen."""
    for name, value in numbers.items():
        if not isinstance(value, jax.core.Tracer) and not value >= 0:
            raise ValueError(f"{name}={value}; give a number of at least 0")
