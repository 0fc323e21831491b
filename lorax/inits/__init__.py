"""Initialisations: `(key, kernel, target, stats) -> (adapter, kernel)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lorax.inits import (
    corda,
    eva,
    gaussian,
    lora_ga,
    lora_one,
    milora,
    olora,
    orthogonal,
    pissa,
    standard,
)
from lorax.targets import Target


class Init(NamedTuple):
    """An initialisation and what it may be combined with.

    Attributes:
      make: `(key, kernel, target, stats) -> (adapter, kernel)`.
      adapters: the parametrisations it has a meaning for.
      options: its hyperparameters and their defaults.
      stats: what it needs from `lorax.calibrate`: "gradient" (`GradSketch`),
        "activation" (`ActivationStats`), "covariance" (`Covariance`) or None.
    """

    make: Callable[..., Any]
    adapters: tuple[str, ...] = ("lora", "dora")
    options: dict[str, Any] = {}
    stats: str | None = None


EVERY = ("lora", "dora", "adalora")
INITS = {
    "standard": Init(standard.standard, adapters=EVERY),
    "gaussian": Init(gaussian.gaussian, options=gaussian.OPTIONS),
    "pissa": Init(pissa.pissa, adapters=EVERY, options=pissa.OPTIONS),
    "olora": Init(olora.olora),
    "lora_ga": Init(lora_ga.lora_ga, options=lora_ga.OPTIONS, stats="gradient"),
    "lora_one": Init(lora_one.lora_one, options=lora_one.OPTIONS, stats="gradient"),
    "eva": Init(eva.eva, options=eva.OPTIONS, stats="activation"),
    "corda": Init(corda.corda, options=corda.OPTIONS, stats="covariance"),
    "milora": Init(milora.milora, adapters=EVERY),
    "orthogonal": Init(orthogonal.orthogonal, options=orthogonal.OPTIONS),
}
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


def require_stats(path: str, target: Target, stats: Mapping[str, Any] | None) -> Any:
    """Returns the statistics of a path; ValueError where its init has none."""
    if target.adapter == "full" or INITS[target.init].stats is None:
        return None
    if stats is None or path not in stats:
        raise ValueError(
            f"{path}: init={target.init!r} looks at data; pass stats=lorax.calibrate("
            "key, loss_fn, params, targets, batches, kernels) to lorax.init, made with "
            "the same targets"
        )
    return stats[path]


__all__ = ["INITS", "Init", "check", "require_stats"]
