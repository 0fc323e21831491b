"""Low-rank updates as two factors: which adapters have them, and their matrices.

    update = scale * a @ b,    a: [*stack, in, rank],    b: [*stack, rank, out]

whatever the axes of the leaf; the stack is of layers or experts, and of a population's
members if it has a leading axis for them. Matrices are at least float32. For an adapter
with three factors (AdaLora), the outer two, p and q, take the places of a and b.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorax import _explicit, linalg
from lorax.adapters import layout

READS, MIDDLE, WRITES = (
    ("batch", "in", "rank"),
    ("batch", "rank"),
    ("batch", "rank", "out"),
)
"""The `Field.words` of the factors."""


class Both(NamedTuple):
    """A pair of values, one for each factor of an adapter.

    Attributes:
      a: for the factor that reads.
      b: for the factor that writes.
    """

    a: jax.Array
    b: jax.Array


def is_pair(adapter: Any) -> bool:
    """True if the class declares a and b as a pair whose product is the update.

    The update may also have a gain, as in Dora.
    """
    return any(field.pair for field in getattr(adapter, "fields", {}).values())


def has_factors(adapter: Any) -> bool:
    """True if the update is a product of trained fields, one reading, one writing."""
    words = [adapter.fields[name].words for name in adapter.roles]
    paired = is_pair(adapter) and {READS, WRITES} <= set(words)
    return paired or sorted(words) == sorted([READS, MIDDLE, WRITES])


def factors_of(adapter: Any) -> Both:
    """Returns the factors as stored; for an AdaLora, p and q."""
    return Both(*(getattr(adapter, name) for name in _names(adapter)))


def _names(adapter: Any) -> tuple[str, str]:
    if is_pair(adapter):
        return "a", "b"
    names = {adapter.fields[name].words: name for name in adapter.roles}
    return names[READS], names[WRITES]


def features(adapter: Any) -> tuple[int, int]:
    """Returns how many features the kernel reads, and how many it writes."""
    a, b = factors_of(adapter)
    n = len(adapter.axes.batch)
    return math.prod(a.shape[n:-1]), math.prod(b.shape[n + 1 :])


def matrices(adapter: Any) -> Both:
    """Returns the factors as `[*stack, in, rank]` and `[*stack, rank, out]`."""
    factors = factors_of(adapter)
    stack = factors.a.shape[: layout.stack_axes(factors.a, adapter.axes)]
    return _shaped(factors, stack, adapter.rank)


def stacked(adapter: Any, like: Both | None = None) -> Both:
    """Returns the factors as `[n, in, rank]` and `[n, rank, out]`.

    Args:
      adapter: gives the axes and the rank.
      like: arrays in the factors' shapes to use instead of the factors.
    """
    factors = factors_of(adapter)
    stack = factors.a.shape[: layout.stack_axes(factors.a, adapter.axes)]
    return _shaped(like or factors, (math.prod(stack),), adapter.rank)


def _shaped(factors: Both, stack: tuple[int, ...], rank: int) -> Both:
    n, whole = math.prod(stack), (None,) * (len(stack) + 2)

    def shaped(factor: jax.Array, *shape: int) -> jax.Array:
        wide = factor.astype(linalg.wide(factor))
        return _explicit.reshape(wide, (*stack, *shape), whole)

    a, b = factors
    return Both(
        shaped(a, a.size // (n * rank), rank), shaped(b, rank, b.size // (n * rank))
    )


def with_matrices(adapter: Any, a: jax.Array, b: jax.Array) -> Any:
    """Returns the adapter with these factors, in its axes and dtypes.

    Args:
      adapter: an adapter of any rank.
      a: `[n, in, rank]`.
      b: `[n, rank, out]`.
    """
    old, rank = factors_of(adapter), a.shape[-1]
    n = layout.stack_axes(old.a, adapter.axes)
    shapes = (
        (*old.a.shape[:-1], rank),
        (*old.b.shape[:n], rank, *old.b.shape[n + 1 :]),
    )
    new = (
        factor.reshape(shape).astype(was.dtype)
        for factor, shape, was in zip((a, b), shapes, old, strict=True)
    )
    return adapter.replace(**dict(zip(_names(adapter), new, strict=True)))


def with_triplets(adapter: Any, u: jax.Array, s: jax.Array, vt: jax.Array) -> Any:
    """Returns the adapter whose factors have the product `u @ diag(s) @ vt`.

    Args:
      adapter: has two factors, which share the product evenly, or three.
      u: `[n, in, rank]`.
      s: `[n, rank]`.
      vt: `[n, rank, out]`.
    """
    fields = adapter.fields.items()
    middle = next((name for name, f in fields if f.words == MIDDLE), None)
    if middle is None:
        return with_matrices(adapter, *balanced(u, s, vt))
    old = getattr(adapter, middle)
    new = s.reshape(*old.shape[:-1], -1).astype(old.dtype)
    return with_matrices(adapter, u, vt).replace(**{middle: new})


def nearest(adapter: Any, update: jax.Array) -> tuple[Any, jax.Array]:
    """Returns the adapter that best approximates an update, and the error.

    By Eckart and Young, it consists of the leading singular triplets.

    Args:
      adapter: has two factors, which share the product evenly, or three; for a stack,
        it may adapt only some layers.
      update: in the leaf's layout; only the adapter's layers are read.

    Returns:
      The adapter, and the sum of squares of what its update lacks.
    """
    if adapter.layers is not None:
        update = layout.chosen(update, adapter.layers, adapter.axes.batch[0])
    matrix = layout.matrices(update, adapter.axes)
    u, s, vt = linalg.svd(matrix, adapter.rank)
    triplets = u, s / adapter.scale, vt
    flat = (part.reshape(-1, *part.shape[matrix.ndim - 2 :]) for part in triplets)
    left = jnp.sum(matrix**2) - jnp.sum(s**2)
    return with_triplets(adapter, *flat), left


def balanced(u: jax.Array, s: jax.Array, vt: jax.Array, scale: float = 1.0) -> Both:
    """Returns factors of equal size with `scale * a @ b = u @ diag(s) @ vt`.

    A direction of size zero keeps its unit column in a and gets a zero row in b: with
    both zero, no gradient would ever reach it.
    """
    s = s[..., None, :]
    root = jnp.sqrt(jnp.where(s > 0, s / abs(scale), 1.0))
    return Both(u * root, (s / (scale * root)).mT * vt)
