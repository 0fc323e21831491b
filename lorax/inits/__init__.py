"""Initialisations: `(key, kernel, target, stats) -> (adapter, kernel)`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from lorax import adapters, registry
from lorax.inits import (
    corda,
    eva,
    gaussian,
    lora_ga,
    lora_one,
    lora_sb,
    milora,
    olora,
    orthogonal,
    pissa,
    standard,
)
from lorax.kernels import Kernel
from lorax.targets import Target


class Init(NamedTuple):
    """An initialisation and what it may be combined with.

    Attributes:
      make: `(key, kernel, target, stats) -> (adapter, kernel)`.
      calls: the classmethod of a parametrisation with which it makes the adapter, such
        as "from_factors" or "from_triplets"; it works for classes that have it. None if
        it works for every class.
      options: its hyperparameters and their defaults.
      stats: what it needs from `lorax.calibrate`: "gradient" (`GradSketch`),
        "activation" (`ActivationStats`), "covariance" (`Covariance`) or None.
      keeps_base: True if no part of the kernel moves into the adapter, whatever the
        options, so that members of a population can share one base.
    """

    make: Callable[..., Any]
    calls: str | None = "from_factors"
    options: Mapping[str, Any] = {}
    stats: str | None = None
    keeps_base: bool = False


REGISTRY: dict[str, Init] = {}
"""Inits by the name used in `Target.init`."""
STANDARD = "standard"
"""Each class's own init."""
STARTS = {"loftq": STANDARD, "qpissa": "pissa"}
"""The inits from which LoftQ methods start; they need the base and its format."""
STATS = (None, "gradient", "activation", "covariance")


def register(
    name: str,
    make: Callable[..., Any] | None = None,
    *,
    calls: str | None = "from_factors",
    options: Mapping[str, Any] | None = None,
    stats: str | None = None,
    keeps_base: bool = False,
) -> Any:
    """Registers an initialisation under a name, for targets and configs.

    Args:
      name: the name to use in `Target(init=)`.
      make: `(key, kernel, target, stats) -> (adapter, kernel)`; None returns a
        decorator.
      calls: see `Init`.
      options: its hyperparameters and their defaults.
      stats: what it needs from `lorax.calibrate`: "gradient", "activation",
        "covariance" or None; see `Init`.
      keeps_base: see `Init`.

    Returns:
      The function, or the decorator.

    Raises:
      ValueError: the name belongs to another function, or unknown `stats`.

    Example:
      >>> from lorax.adapters import making
      >>> from lorax.inits import build
      >>> @register("halves")
      ... def halves(key, kernel, target, stats=None):
      ...     in_, out, batch = making.sizes(kernel, target)
      ...     a = jnp.full((*batch, *in_, target.rank), 0.5)
      ...     b = jnp.zeros((*batch, target.rank, *out))
      ...     return build.around_factors(kernel, target, a, b), kernel
      >>> import jax.numpy as jnp, lorax
      >>> target = lorax.Target("w", rank=1, init="halves")
      >>> lorax.init(jax.random.key(0), {"w": jnp.ones((2, 2))}, target)[0]["w"].a[0, 0]
      Array(0.5, dtype=float32)
    """
    if make is None:
        return functools.partial(
            register,
            name,
            calls=calls,
            options=options,
            stats=stats,
            keeps_base=keeps_base,
        )
    if stats not in STATS:
        raise ValueError(
            f"init {name!r}: stats={stats!r}; choose one of "
            f"{', '.join(map(repr, STATS))}"
        )
    held = REGISTRY.get(name)
    registry.require_free("init", name, held and held.make, make)
    REGISTRY[name] = Init(make, calls, dict(options or {}), stats, keeps_base)
    return make


register(STANDARD, standard.standard, calls=None, keeps_base=True)
register("gaussian", gaussian.gaussian, options=gaussian.OPTIONS, keeps_base=True)
register("pissa", pissa.pissa, calls="from_triplets", options=pissa.OPTIONS)
register("olora", olora.olora)
register("lora_ga", lora_ga.lora_ga, options=lora_ga.OPTIONS, stats="gradient")
register("lora_one", lora_one.lora_one, options=lora_one.OPTIONS, stats="gradient")
register(
    "lora_sb",
    lora_sb.lora_sb,
    calls="from_bases",
    options=lora_sb.OPTIONS,
    stats="gradient",
)
register("eva", eva.eva, options=eva.OPTIONS, stats="activation")
register("corda", corda.corda, options=corda.OPTIONS, stats="covariance")
register("milora", milora.milora, calls="from_triplets")
register(
    "orthogonal",
    orthogonal.orthogonal,
    options=orthogonal.OPTIONS,
    keeps_base=True,
)


def of_target(target: Target) -> Init:
    """Returns a target's init, registered or a function.

    Raises:
      ValueError: a name that is not registered.
    """
    held = next((i for i in REGISTRY.values() if i.make is target.init), None)
    if held is not None:
        return held
    if callable(target.init):
        return Init(target.init, None, dict(target.options))
    if target.init in STARTS:
        raise ValueError(
            f"init={target.init!r} needs the format of the base; start from "
            f"init={STARTS[target.init]!r}, and pass what lorax.init returns to "
            "lorax.loftq(adapters, params, rules, kernels)"
        )
    if target.init not in REGISTRY:
        raise ValueError(
            f"init={target.init!r}; choose one of {', '.join(REGISTRY)}, import the "
            "module that registers it, or pass the function itself"
        )
    return REGISTRY[target.init]


def check(target: Target) -> None:
    """Raises ValueError for an unknown init or option, or a meaningless combination."""
    init, cls = of_target(target), adapters.of_target(target)
    if init.calls is not None and not hasattr(cls, init.calls):
        able = [n for n, c in adapters.REGISTRY.items() if hasattr(c, init.calls)]
        raise ValueError(
            f"{target.pattern!r}: init={target.init!r} has no meaning for "
            f"adapter={target.adapter!r}, which has no {init.calls}; use it with "
            f"{' or '.join(able)}"
        )
    known = {*init.options, *cls.options}
    if unknown := set(dict(target.options)) - known:
        raise ValueError(
            f"{target.pattern!r}: init={target.init!r} for adapter={target.adapter!r} "
            f"has no option {', '.join(sorted(unknown))}; it has "
            f"{', '.join(sorted(known)) or 'none'}"
        )
    cls.check_target(target)


def require_value(kernel: Kernel, target: Target) -> None:
    """Raises ValueError if an init reads a kernel that the program computes."""
    init = of_target(target)
    registered = any(init is held for held in REGISTRY.values())
    if kernel.leaves and registered and not init.keeps_base:
        raise ValueError(
            f"{kernel.path}: init={target.init!r} reads the kernel, or moves a part of "
            f"it, but the program computes it from {', '.join(kernel.leaves)} when it "
            "runs; use init='standard' or 'gaussian'"
        )


def require_stats(path: str, target: Target, stats: Mapping[str, Any] | None) -> Any:
    """Returns the statistics of a path; ValueError if its init lacks those it needs."""
    if of_target(target).stats is None:
        return None if stats is None else stats.get(path)
    if stats is None or path not in stats:
        raise ValueError(
            f"{path}: init={target.init!r} looks at data; pass stats=lorax.calibrate("
            "key, loss_fn, params, targets, batches, kernels) to lorax.init, with the "
            "same targets"
        )
    return stats[path]


def made(
    key: jax.Array,
    kernel: Kernel,
    target: Target,
    stats: Any,
    shared: Mapping[str, jax.Array],
) -> tuple[Any, Kernel]:
    """Returns the adapter of one leaf, and what is left of its kernel."""
    init = of_target(target)
    if init.make is standard.standard:
        return standard.standard(key, kernel, target, stats, shared)
    return init.make(key, kernel, target, stats)


__all__ = [
    "REGISTRY",
    "STANDARD",
    "Init",
    "check",
    "made",
    "of_target",
    "register",
    "require_stats",
    "require_value",
]
