"""What the algebra of adapters shares: one scale, one truncation, one result."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorax import linalg
from lorax.adapters import layout
from lorax.types import Adapters


class Combined(NamedTuple):
    """Adapters, and what their compression cost.

    Attributes:
      adapters: `{path: Adapter}`.
      error: `{path: error}`: the Frobenius norm of what a truncation took from the
        update, over that of the update; 0 where nothing was truncated.
    """

    adapters: Adapters
    error: dict[str, jax.Array]


def rescaled(adapter: Any, scale: float) -> Any:
    """Returns the adapter with another scale and the ratio in b (AdaLora: in lam)."""
    if adapter.scale == scale:
        return adapter
    name = adapter.absorbs
    if name is None:
        raise ValueError(
            f"{type(adapter).__name__} has scale {adapter.scale}, and none of its "
            f"arrays can take the ratio to {scale}; give all sets one scale"
        )
    field, ratio = getattr(adapter, name), adapter.scale / scale
    folded = (ratio * field.astype(layout.wide(field))).astype(field.dtype)
    return adapter.replace(**{name: folded}, scale=scale)


def shared_scale(adapters: Sequence[Any]) -> float:
    """The first scale that is not zero, on which the others can be folded."""
    return next((a.scale for a in adapters if a.scale), 1.0)


def relative(error: jax.Array, whole: jax.Array) -> jax.Array:
    """Returns error / whole, and 0 for 0 / 0."""
    return jnp.where(whole > 0, error / jnp.where(whole > 0, whole, 1.0), error)


def truncated(
    matrix: jax.Array, rank: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the best rank-`rank` part of one matrix, by a dense decomposition.

    Args:
      matrix: `[in, out]`, at least float32.
      rank: at most min(in, out).

    Returns:
      `u: [in, rank]`, `s: [rank]`, `vt: [rank, out]`, signs as `linalg.svd` has
      them; the squared Frobenius norms of what was cut off and of the matrix.
    """
    u, s, vt = linalg.svd(matrix, min(matrix.shape))
    cut, square = jnp.sum(s[rank:] ** 2), jnp.sum(s**2)
    return u[:, :rank], s[:rank], vt[:rank], cut, square


def statics(adapter: Any) -> dict[str, Any]:
    """Returns the static fields but for the scale."""
    fields = (f.name for f in dataclasses.fields(adapter))
    return {
        name: getattr(adapter, name)
        for name in fields
        if name not in adapter.roles and name != "scale"
    }
