"""What the algebra of adapters shares: scales, truncation, and the type of a result."""

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
    """Adapters, and the error of compressing them.

    Attributes:
      adapters: `{path: Adapter}`.
      error: `{path: error}`: the Frobenius norm of what truncation removed from the
        update, relative to that of the update; 0 if nothing was truncated.
    """

    adapters: Adapters
    error: dict[str, jax.Array]


def rescaled(adapter: Any, scale: float) -> Any:
    """Returns the adapter at another scale; b (AdaLora: lam) absorbs the ratio."""
    if adapter.scale == scale:
        return adapter
    name = adapter.absorbs
    if name is None:
        raise ValueError(
            f"{type(adapter).__name__} has scale {adapter.scale}, and none of its "
            f"arrays can absorb the ratio to {scale}; give all sets the same scale"
        )
    field, ratio = getattr(adapter, name), adapter.scale / scale
    folded = (ratio * field.astype(layout.wide(field))).astype(field.dtype)
    return adapter.replace(**{name: folded}, scale=scale)


def shared_scale(adapters: Sequence[Any]) -> float:
    """The first nonzero scale, which the others can be converted to."""
    return next((a.scale for a in adapters if a.scale), 1.0)


def relative(error: jax.Array, whole: jax.Array) -> jax.Array:
    """Returns error / whole, with 0 / 0 = 0."""
    return jnp.where(whole > 0, error / jnp.where(whole > 0, whole, 1.0), error)


def truncated(
    matrix: jax.Array, rank: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the best rank-`rank` approximation of one matrix, by a dense SVD.

    Args:
      matrix: `[in, out]`, at least float32.
      rank: at most min(in, out).

    Returns:
      `u: [in, rank]`, `s: [rank]`, `vt: [rank, out]`, with the signs of `linalg.svd`;
      and the squared Frobenius norms of what was cut off and of the matrix.
    """
    u, s, vt = linalg.svd(matrix, min(matrix.shape))
    cut, square = jnp.sum(s[rank:] ** 2), jnp.sum(s**2)
    return u[:, :rank], s[:rank], vt[:rank], cut, square


def statics(adapter: Any) -> dict[str, Any]:
    """Returns the static fields except the scale."""
    fields = (f.name for f in dataclasses.fields(adapter))
    return {
        name: getattr(adapter, name)
        for name in fields
        if name not in adapter.roles and name != "scale"
    }
