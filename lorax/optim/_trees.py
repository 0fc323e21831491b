"""Adapter trees as optax passes them, possibly with parts masked out.

`optax.masked` and `optax.partition` mask whole adapters, or single fields of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lorax import tree
from lorax.adapters import pairs
from lorax.types import Adapters


def is_present(adapter: Any) -> bool:
    """False for an adapter that `optax.masked` or `optax.partition` masked out."""
    return bool(jax.tree.leaves(adapter))


def is_pair(adapter: Any) -> bool:
    """True for the adapters that pair transforms act on."""
    return pairs.is_pair(adapter) and is_present(adapter)


def only_pairs(adapters: Adapters) -> dict[str, Any]:
    """Returns the adapters that pair transforms act on."""
    return {path: adapter for path, adapter in adapters.items() if is_pair(adapter)}


def has_triplets(adapter: Any) -> bool:
    """True for the adapters whose update is `p diag(lam) q`."""
    roles = set(getattr(adapter, "roles", {}).values())
    return {"p", "lam", "q"} <= roles and is_present(adapter)


def map_present(function: Callable[[str, Any], Any], adapters: Adapters) -> Adapters:
    """Returns `{path: function(path, adapter)}`; masked adapters stay as they are."""

    def own(path: str, adapter: Any) -> Any:
        return function(path, adapter) if is_present(adapter) else adapter

    return tree.map_adapters(own, adapters)


def factor_mask(
    adapters: Adapters, roles: tuple[str, ...] = ("a", "b"), others: bool = False
) -> Adapters:
    """Returns True for the pairs' leaves with these roles, or for all other leaves."""

    def marked(_: str, adapter: Any) -> Any:
        pair, fields = is_pair(adapter), adapter.roles.items()
        return adapter.replace(
            **{f: (pair and role in roles) != others for f, role in fields}
        )

    return map_present(marked, adapters)


def require_params(adapters: Adapters | None) -> Adapters:
    """Raises ValueError if `update` was called without the parameters."""
    if adapters is None:
        raise ValueError(
            "this transformation reads the adapters: call "
            "tx.update(grads, state, adapters)"
        )
    return adapters


def require_adapters(adapters: Any, name: str) -> Adapters:
    """Raises unless this is an adapter tree of real arrays that `name` can act on.

    Whole adapters may be masked out, by `optax.masked` or `optax.partition`.
    """
    whole = isinstance(adapters, Mapping) and all(
        hasattr(adapter, "roles") or not is_present(adapter)
        for adapter in adapters.values()
    )
    if not whole or not adapters:
        raise ValueError(
            f"{name} acts on the adapters that lorax.init returns, {{path: Adapter}}, "
            f"but was given {_told(adapters)}"
        )
    for path, adapter in adapters.items():
        if not is_present(adapter):
            continue
        if not hasattr(adapter, "fields"):
            raise ValueError(
                f"{path}: {name} reads the fields that an adapter declares, but "
                f"{type(adapter).__name__} declares none: make it a subclass of "
                "lorax.adapters.Parametrisation"
            )
        for leaf in jax.tree.leaves(adapter):
            if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
                raise ValueError(
                    f"{path}: {name} needs real factors, but these are {leaf.dtype}"
                )
    return dict(adapters)


def require_whole(adapters: Adapters, name: str) -> None:
    """Raises ValueError for an adapter that an optax wrapper has partly masked."""
    for path, adapter in adapters.items():
        fields = [] if not is_present(adapter) else sorted(adapter.roles)
        out = [f for f in fields if isinstance(getattr(adapter, f), optax.MaskedNode)]
        if out:
            raise ValueError(
                f"{path}: {name} reads the factors of an adapter together, but "
                f"optax.masked or optax.partition hides {', '.join(out)} from it; "
                "label whole adapters, {path: label}, or split the fields afterwards: "
                f"optax.chain({name}(...), optax.partition(...))"
            )


def require_pairs(adapters: Any, name: str) -> Adapters:
    """Returns the adapters; ValueError if a transform of (a, b) cannot act on one."""
    given = require_adapters(adapters, name)
    require_whole(given, name)
    for path, adapter in given.items():
        if not is_present(adapter):
            continue
        thin = [n for n in adapter.roles if "rank" in adapter.fields[n].words]
        if thin and not is_pair(adapter):
            raise ValueError(
                f"{path}: {name} acts on pairs a and b whose product is the update, "
                f"but the {', '.join(thin)} of {type(adapter).__name__} are not such a "
                "pair; use lora_plus or an optax optimiser for it, alone or through "
                "optax.partition, or adapt this leaf with adapter='lora'"
            )
    return given


def _told(given: Any) -> str:
    """What was given instead of adapters, and what to write."""
    if getattr(given, "shape", None) == ():
        return (
            "a number: optax.inject_hyperparams calls every callable argument as a "
            "schedule, including a mask; write optax.inject_hyperparams("
            "make_tx, static_args=('mask',))(..., mask=decay_mask)"
        )
    return (
        f"{jax.tree.structure(given)}; write adapters, params = lorax.init(key, "
        "params, targets), then tx.init(adapters). (nnx.Optimizer(model, tx) passes "
        "the model's own parameters: write nnx.Optimizer(adapted, "
        "on_adapters(tx), wrt=nnx.Param) with lorax.interop.nnx.)"
    )
