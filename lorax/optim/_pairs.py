"""The (a, b) pairs inside an adapter tree, as stacks of matrices.

Pair transforms need both factors of one kernel, and its scale, at once. They see every
Lora and Dora as `a: [n, in, rank]`, `b: [n, rank, out]` in float32, whatever the axes
of the leaf, and `n` the layers, experts or slices in it; other adapters pass. How they
are applied to a tree is `_pairwise`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorax import _explicit, linalg, tree
from lorax.adapters import layout
from lorax.types import Adapters, PairStatics


class Both(NamedTuple):
    """What an optimiser keeps of both factors of one adapter, under their names.

    Attributes:
      a: of the first factor; where it has its shape, it is sharded alike.
      b: of the second.
    """

    a: jax.Array
    b: jax.Array


class Pair(NamedTuple):
    """Both factors of one adapter, or of its gradient or update.

    Attributes:
      a: `[n, in, rank]`, at least float32.
      b: `[n, rank, out]`, likewise.
      scale: the factor on `a @ b`: a number, or `[n, 1, 1]` where members of a stack
        differ.
      rank: the true rank, likewise; less than `a.shape[-1]` where a population pads it.
    """

    a: jax.Array
    b: jax.Array
    scale: Any
    rank: Any


def is_pair(adapter: Any) -> bool:
    """True for the adapters that pair transforms act on."""
    own = getattr(adapter, "fields", {}).values()
    return any(field.pair for field in own) and is_present(adapter)


def has_triplets(adapter: Any) -> bool:
    """True for the adapters whose update is `p diag(lam) q`."""
    return {"p", "lam", "q"} <= set(getattr(adapter, "roles", {}).values())


def is_present(adapter: Any) -> bool:
    """False for an adapter that `optax.masked` or `optax.partition` left out."""
    return bool(jax.tree.leaves(adapter))


def map_present(function: Callable[[str, Any], Any], adapters: Adapters) -> Adapters:
    """Returns `{path: function(path, adapter)}`, what is left out as it is."""

    def own(path: str, adapter: Any) -> Any:
        return function(path, adapter) if is_present(adapter) else adapter

    return tree.map_adapters(own, adapters)


def pair_of(adapter: Any, statics: PairStatics | None = None) -> Pair:
    """Returns the factors as stacks of matrices.

    Args:
      adapter: a Lora or Dora of parameters, gradients or updates.
      statics: scale and rank of this member of a population; None: the adapter's own.
    """
    own = PairStatics(adapter.scale, adapter.rank) if statics is None else statics
    return Pair(*stacked(adapter, adapter), own.scale, own.rank)


def stacked(factors: Any, adapter: Any) -> Both:
    """Returns what has the shapes of an adapter's factors as stacks of matrices."""
    n = math.prod(adapter.a.shape[: layout.stack_axes(adapter.a, adapter.axes)])
    rank = adapter.rank

    def flat(factor: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        wide = factor.astype(linalg.wide(factor))
        return _explicit.reshape(wide, shape, (None, None, None))

    return Both(
        flat(factors.a, (n, factors.a.size // (n * rank), rank)),
        flat(factors.b, (n, rank, factors.b.size // (n * rank))),
    )


def zeros(adapter: Any) -> Both:
    """Returns zeros of the factors' shapes, at least float32."""
    both = (adapter.a, adapter.b)
    return Both(*(jnp.zeros_like(x, linalg.wide(x.dtype)) for x in both))


def factor_mask(
    adapters: Adapters, roles: tuple[str, ...] = ("a", "b"), others: bool = False
) -> Adapters:
    """Returns True for the pairs' leaves of these roles, or for all others."""

    def marked(_: str, adapter: Any) -> Any:
        pair, fields = is_pair(adapter), adapter.roles.items()
        return adapter.replace(
            **{f: (pair and role in roles) != others for f, role in fields}
        )

    return map_present(marked, adapters)


def with_pair(adapter: Any, a: jax.Array, b: jax.Array) -> Any:
    """Returns the adapter with these factors, in its own shapes and dtypes."""
    return adapter.replace(
        a=a.reshape(adapter.a.shape).astype(adapter.a.dtype),
        b=b.reshape(adapter.b.shape).astype(adapter.b.dtype),
    )


def require_params(adapters: Adapters | None) -> Adapters:
    """Raises ValueError where an update was called without the parameters."""
    if adapters is None:
        raise ValueError(
            "this transformation reads the adapters: call "
            "tx.update(grads, state, adapters)"
        )
    return adapters


def require_adapters(adapters: Any, name: str) -> Adapters:
    """Raises unless this is an adapter tree of real arrays that `name` can act on.

    Whole adapters may be left out, as `optax.masked` and `optax.partition` do.
    """
    whole = isinstance(adapters, Mapping) and all(
        hasattr(adapter, "roles") or not is_present(adapter)
        for adapter in adapters.values()
    )
    if not whole or not adapters:
        raise ValueError(
            f"{name} acts on the adapters that lorax.init returns, {{path: Adapter}}; "
            f"it was given {_told(adapters)}"
        )
    for path, adapter in adapters.items():
        if not is_present(adapter):
            continue
        if not hasattr(adapter, "fields"):
            raise ValueError(
                f"{path}: {name} reads what an adapter declares of its fields, and "
                f"{type(adapter).__name__} declares none: make it a subclass of "
                "lorax.adapters.Parametrisation"
            )
        for leaf in jax.tree.leaves(adapter):
            if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
                raise ValueError(
                    f"{path}: {name} needs real factors, and these are {leaf.dtype}"
                )
    return dict(adapters)


def require_whole(adapters: Adapters, name: str) -> None:
    """Raises ValueError for an adapter of which a wrapper of optax left a part out."""
    for path, adapter in adapters.items():
        fields = [] if not is_present(adapter) else sorted(adapter.roles)
        out = [f for f in fields if isinstance(getattr(adapter, f), optax.MaskedNode)]
        if out:
            raise ValueError(
                f"{path}: {name} reads the factors of an adapter together, and "
                f"optax.masked or optax.partition keeps {', '.join(out)} from it; "
                "label whole adapters, {path: label}, and put what parts them behind: "
                f"optax.chain({name}(...), optax.partition(...))"
            )


def _told(given: Any) -> str:
    """What was given in place of adapters, and what to write."""
    if getattr(given, "shape", None) == ():
        return (
            "a number: optax.inject_hyperparams calls every function among the "
            "arguments as a schedule, a mask too; write optax.inject_hyperparams("
            "make_tx, static_args=('mask',))(..., mask=decay_mask)"
        )
    return (
        f"{jax.tree.structure(given)}; write adapters, params = lorax.init(key, "
        "params, targets), then tx.init(adapters). (nnx.Optimizer(model, tx) hands "
        "over the model's own parameters: use lorax.training.create_state(key, "
        "adapters, tx) in its place.)"
    )
