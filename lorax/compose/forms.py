"""What the algebra of adapters shares: one form, one way to pad, one way to split.

A low-rank update is seen as a stack of matrices, `a: [n, in, rank]` and `b: [n, rank,
out]`, whatever the axes of the leaf, `n` the layers or experts stacked in it.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorax import linalg
from lorax.adapters import layout
from lorax.types import Adapters

EXACT = jax.lax.Precision.HIGHEST


class Combined(NamedTuple):
    """Adapters, and what their compression cost.

    Attributes:
      adapters: `{path: Adapter}`.
      error: `{path: error}`: the Frobenius norm of what a truncation took from the
        update, over that of the update; 0 where nothing was truncated.
    """

    adapters: Adapters
    error: dict[str, jax.Array]


READS, WRITES, MIDDLE = (
    ("batch", "in", "rank"),
    ("batch", "rank", "out"),
    ("batch", "rank"),
)


def has_factors(adapter: Any) -> bool:
    """True where the update is a product of trained fields: one reads, one writes."""
    fields = [adapter.fields[name] for name in adapter.roles]
    words = [field.words for field in fields]
    paired = any(field.pair for field in fields) and {READS, WRITES} <= set(words)
    return paired or sorted(words) == sorted([READS, MIDDLE, WRITES])


def factor_names(adapter: Any) -> tuple[str, str]:
    """The fields that read and write: ("a", "b"), of an AdaLora ("p", "q")."""
    names = {adapter.fields[name].words: name for name in adapter.roles}
    return names[READS], names[WRITES]


def rank_axes(adapter: Any) -> dict[str, int]:
    """For each trained field that has a rank, which of its axes that is."""
    return {
        name: layout.axis_of(adapter, name, "rank")
        for name in adapter.roles
        if "rank" in adapter.fields[name].words
    }


def padded(adapter: Any, rank: int) -> Any:
    """Returns the adapter with zeros up to `rank` in every factor: the same update."""
    fields = {}
    if not adapter.padded and rank > adapter.rank:
        raise ValueError(
            f"{type(adapter).__name__} of rank {adapter.rank} cannot be widened to "
            f"{rank}: zeros in its arrays would change its update; give all sets one "
            "rank"
        )
    for name, axis in rank_axes(adapter).items():
        field = getattr(adapter, name)
        widths = [(0, 0)] * field.ndim
        widths[axis] = (0, rank - field.shape[axis])
        fields[name] = jnp.pad(field, widths) if rank > adapter.rank else field
    return adapter.replace(**fields)


def cut(adapter: Any, rank: int) -> Any:
    """Returns the adapter's leading ranks, the rest being padding, if it has any."""
    if not adapter.padded:
        return adapter
    cut = lambda field, axis: jax.lax.slice_in_dim(field, 0, rank, axis=axis)
    axes = rank_axes(adapter)
    return adapter.replace(
        **{name: cut(getattr(adapter, name), axis) for name, axis in axes.items()}
    )


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


def matrices(adapter: Any) -> tuple[jax.Array, jax.Array]:
    """Returns `a: [n, in, rank]` and `b: [n, rank, out]` in at least float32."""
    first, last = (getattr(adapter, name) for name in factor_names(adapter))
    n, rank = math.prod(first.shape[: len(adapter.axes.batch)]), adapter.rank
    dtype = layout.wide(first, last)
    return (
        first.astype(dtype).reshape(n, -1, rank),
        last.astype(dtype).reshape(n, rank, -1),
    )


def split(
    u: jax.Array, s: jax.Array, vt: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Returns balanced factors with `scale * a @ b = u @ diag(s) @ vt`.

    A direction of size zero keeps its unit column in a, beside a zero row in b: with
    both zero no gradient would ever reach it.
    """
    s = s[..., None, :]
    root = jnp.sqrt(jnp.where(s > 0, s / abs(scale), 1.0))
    return u * root, (s / (scale * root)).mT * vt


def with_matrices(adapter: Any, first: jax.Array, last: jax.Array) -> Any:
    """Returns the adapter with these factors in its own axes and dtypes.

    Args:
      adapter: Lora, Dora, or AdaLora.
      first: `[n, in, rank]`, its a or p.
      last: `[n, rank, out]`, its b or q.
    """
    names, rank, n = factor_names(adapter), first.shape[-1], len(adapter.axes.batch)
    old = [getattr(adapter, name) for name in names]
    new = (
        first.reshape(*old[0].shape[:-1], rank).astype(old[0].dtype),
        last.reshape(*old[1].shape[:n], rank, *old[1].shape[n + 1 :]).astype(
            old[1].dtype
        ),
    )
    return adapter.replace(**dict(zip(names, new, strict=True)))


def with_triplets(adapter: Any, u: jax.Array, s: jax.Array, vt: jax.Array) -> Any:
    """Returns the adapter with the product `u @ diag(s) @ vt` in its factors.

    Args:
      adapter: Lora or Dora, which get balanced factors, or AdaLora.
      u: `[n, in, rank]`.
      s: `[n, rank]`.
      vt: `[n, rank, out]`.
    """
    fields = adapter.fields.items()
    middle = next((name for name, field in fields if field.words == MIDDLE), None)
    if middle is None:
        return with_matrices(adapter, *split(u, s, vt, 1.0))
    old = getattr(adapter, middle)
    after: Any = with_matrices(adapter, u, vt)
    new = s.reshape(*old.shape[:-1], -1).astype(old.dtype)
    return after.replace(**{middle: new})


def is_whole(value: Any) -> bool:
    """True for an integer that is no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    """True for a Python or numpy number whose value is known."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


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


def features(adapter: Any) -> tuple[int, int]:
    """Returns how many features the kernel reads and writes."""
    first, last = (getattr(adapter, name) for name in factor_names(adapter))
    n = len(adapter.axes.batch)
    return math.prod(first.shape[n:-1]), math.prod(last.shape[n + 1 :])


def statics(adapter: Any) -> dict[str, Any]:
    """Returns the static fields but for the scale."""
    fields = (f.name for f in dataclasses.fields(adapter))
    return {
        name: getattr(adapter, name)
        for name in fields
        if name not in adapter.roles and name != "scale"
    }
