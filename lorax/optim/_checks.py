"""Checks of hyperparameters, made where their values can be read.

A hyperparameter that `optax.inject_hyperparams` or a population passes as a tracer has
no value yet, and passes. A schedule passes where one is taken. Elsewhere it is refused:
it would fail deep inside the first update.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

from lorax import tree
from lorax.optim import _pairs
from lorax.types import Adapters

Scalar = Any
"""A number, an array of no axes, or a tracer."""

ScalarOrSchedule = Scalar | Callable[[Any], Any]
"""A `Scalar`, or a function from the step count to one."""


def at_least(
    name: str, value: ScalarOrSchedule, low: float = 0.0, schedule: bool = False
) -> None:
    """Raises ValueError where the value is known, and below `low` or not finite."""
    known = _known(name, value, schedule)
    if known is not None and not low <= known < math.inf:
        raise ValueError(f"{name}={known}; give a number of at least {low:g}")


def positive(name: str, value: ScalarOrSchedule, schedule: bool = False) -> None:
    """Raises ValueError where the value is known, and zero, negative or not finite."""
    known = _known(name, value, schedule)
    if known is not None and not 0 < known < math.inf:
        raise ValueError(f"{name}={known}; give a number > 0")


def average(name: str, value: Scalar) -> None:
    """Raises ValueError unless a known value is a weight of averaging, in [0, 1)."""
    known = _known(name, value)
    if known is not None and not 0 <= known < 1:
        raise ValueError(f"{name}={known}; give a decay rate in [0, 1)")


def moments(
    b1: Scalar, b2: Scalar, eps: Scalar, weight_decay: ScalarOrSchedule
) -> None:
    """Raises ValueError for hyperparameters of Adam that are out of range."""
    average("b1", b1)
    average("b2", b2)
    positive("eps", eps)
    at_least("weight_decay", weight_decay, schedule=True)


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}; choose one of {', '.join(choices)}")


def factor_pairs(adapters: Any, name: str) -> Adapters:
    """Returns the adapters; ValueError for what a transform of (a, b) cannot act on."""
    given = _pairs.require_adapters(adapters, name)
    _pairs.require_whole(given, name)
    for path, adapter in given.items():
        if not _pairs.is_present(adapter):
            continue
        thin = [n for n in adapter.roles if "rank" in adapter.fields[n].words]
        if thin and not _pairs.is_pair(adapter):
            raise ValueError(
                f"{path}: {name} acts on pairs a and b whose product is the update, "
                f"and the {', '.join(thin)} of {type(adapter).__name__} are not such a "
                "pair; use lora_plus or an optax optimiser for it, by itself or "
                "through optax.partition, or adapt this leaf with adapter='lora'"
            )
    return given


def value(given: ScalarOrSchedule) -> float | None:
    """Returns a known number, None for a schedule or one that is traced."""
    return None if callable(given) else _known("value", given)


def number(name: str, value: Any) -> None:
    """Raises ValueError for a schedule, where only one number will do."""
    if callable(value):
        raise ValueError(
            f"{name} is a schedule, and this takes a number; make the transformation "
            f"by optax.inject_hyperparams(...)({name}=schedule), which calls it at "
            "every step"
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
        raise ValueError(f"{name}={value!r}; give one number")
    return None
