"""Checks of numbers and choices, made wherever their values can be read.

A tracer (under `jit`, in a population, from `optax.inject_hyperparams`) has no value
yet, so it passes. A schedule passes where the argument accepts one and is refused
elsewhere, where it would only fail deep inside the first update.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

from lorax import tree

Number = Any
"""A number, a zero-dimensional array, or a tracer."""

NumberOrSchedule = Number | Callable[[Any], Any]
"""A `Number`, or a function from the step count to one."""


def is_whole(value: Any) -> bool:
    """True for an integer whose value is known; a bool is not one."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    """True for a Python or numpy number whose value is known; a bool is not one."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """True for a number whose value is known and is neither NaN nor infinite."""
    return is_real(value) and math.isfinite(value)


def one_of(name: str, value: Any, choices: tuple[str, ...], where: str = "") -> None:
    """Raises ValueError, prefixed by `where`, unless the value is one of `choices`."""
    if value not in choices:
        told = f"{where}: " if where else ""
        raise ValueError(f"{told}{name}={value!r}; choose one of {', '.join(choices)}")


def at_least(
    name: str,
    value: NumberOrSchedule,
    low: float = 0.0,
    *,
    schedule: bool = False,
    infinite: bool = False,
) -> None:
    """Raises ValueError for a number that is known to be below `low`, or NaN.

    Args:
      name: the argument's name.
      value: a number, traced or not.
      low: the smallest allowed value.
      schedule: True lets a schedule pass.
      infinite: True lets infinity pass.
    """
    known = _known(name, value, schedule)
    if known is not None and not (low <= known and (infinite or known < math.inf)):
        raise ValueError(f"{name}={value}; give a number of at least {low:g}")


def positive(
    name: str,
    value: NumberOrSchedule,
    *,
    schedule: bool = False,
    infinite: bool = False,
) -> None:
    """Raises ValueError for a number that is known not to be positive.

    Args:
      name: the argument's name.
      value: a number, traced or not.
      schedule: True lets a schedule pass.
      infinite: True lets infinity pass.
    """
    known = _known(name, value, schedule)
    if known is not None and not (0 < known and (infinite or known < math.inf)):
        raise ValueError(f"{name}={value}; give a number > 0")


def all_positive(**numbers: Number) -> None:
    """Raises ValueError for a number that is known not to be positive; inf passes."""
    for name, number in numbers.items():
        positive(name, number, infinite=True)


def average(name: str, value: Number) -> None:
    """Raises ValueError unless a known value is an averaging decay rate in [0, 1)."""
    known = _known(name, value)
    if known is not None and not 0 <= known < 1:
        raise ValueError(f"{name}={value}; give a decay rate in [0, 1)")


def known(value: NumberOrSchedule) -> float | None:
    """Returns the number, or None for a schedule or a traced value."""
    return None if callable(value) else _known("value", value)


def number(name: str, value: Any) -> None:
    """Raises ValueError for a schedule where a single number is required."""
    if callable(value):
        raise ValueError(
            f"{name} is a schedule, and this takes a number; build the transformation "
            f"with optax.inject_hyperparams(...)({name}=schedule), which evaluates the "
            "schedule at every step"
        )


def _known(name: str, value: Any, schedule: bool = False) -> float | None:
    if callable(value) and schedule:
        return None
    number(name, value)
    if isinstance(value, numbers.Real):
        return float(value)
    if tree.is_concrete(value) and getattr(value, "shape", None) == ():
        return float(value)
    if value is None or isinstance(value, str) or tree.is_concrete(value):
        raise ValueError(f"{name}={value!r}; give a single number")
    return None
