"""Initialisations: `(key, kernel, target, stats) -> (adapter, kernel)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from lorax.inits.standard import standard
from lorax.targets import Target


class Init(NamedTuple):
    """An initialisation and what it may be combined with.

    Attributes:
      make: `(key, kernel, target, stats) -> (adapter, kernel)`.
      adapters: the parametrisations it has a meaning for.
      options: its hyperparameters and their defaults.
      stats: what it needs from `lorax.calibrate`: "gradient", "activations" or None.
    """

    make: Callable[..., Any]
    adapters: tuple[str, ...] = ("lora", "dora")
    options: dict[str, Any] = {}
    stats: str | None = None


INITS = {"standard": Init(standard, adapters=("lora", "dora", "adalora"))}
"""Init by the name that `Target.init` gives."""

ADAPTER_OPTIONS = {"dora": ("detach_norm",)}


def check(target: Target) -> None:
    """Raises ValueError for an unknown init or option, or a meaningless combination."""
    if target.adapter == "full":
        return
    if target.init not in INITS:
        raise ValueError(f"init={target.init!r}; choose one of {', '.join(INITS)}")
    init = INITS[target.init]
    if target.adapter not in init.adapters:
        raise ValueError(
            f"{target.pattern!r}: init={target.init!r} has no meaning for "
            f"adapter={target.adapter!r}; use it with {' or '.join(init.adapters)}"
        )
    known = {*init.options, *ADAPTER_OPTIONS.get(target.adapter, ())}
    if unknown := set(dict(target.options)) - known:
        raise ValueError(
            f"{target.pattern!r}: init={target.init!r} of adapter={target.adapter!r} "
            f"has no option {', '.join(sorted(unknown))}; it has "
            f"{', '.join(sorted(known)) or 'none'}"
        )


__all__ = ["INITS", "Init", "check", "standard"]
