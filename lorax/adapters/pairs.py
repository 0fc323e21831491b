"""A low-rank update as two factors: which adapters have them, and as matrices.

    update = scale * a @ b,    a: [*stack, in, rank],    b: [*stack, rank, out]

whatever the axes of the leaf; the stack is of layers or experts, and of members where a
population's axis leads. Matrices are at least float32. An adapter of three factors
(AdaLora) has its outer two, p and q, in the places of a and b.
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
"""The `Field.words` of factors."""


class Both(NamedTuple):
    """Something of both factors of one adapter.

    Attributes:
      a: of the factor that reads.
      b: of the factor that writes.
    """

    a: jax.Array
    b: jax.Array


def is_pair(adapter: Any) -> bool:
    """True where the class declares a and b a pair: their product is the update.

    Up to a gain, as in Dora.
    """
    return any(field.pair for field in getattr(adapter, "fields", {}).values())


def has_factors(adapter: Any) -> bool:
    """True where the update is a product of trained fields: one reads, one writes."""
    words = [adapter.fields[name].words for name in adapter.roles]
    paired = is_pair(adapter) and {READS, WRITES} <= set(words)
    return paired or sorted(words) == sorted([READS, MIDDLE, WRITES])


def factors_of(adapter: Any) -> Both:
    """Returns the factors as they are stored; of an AdaLora p and q."""
    return Both(*(getattr(adapter, name) for name in _names(adapter)))


def _names(adapter: Any) -> tuple[str, str]:
    if is_pair(adapter):
        return "a", "b"
    names = {adapter.fields[name].words: name for name in adapter.roles}
    return names[READS], names[WRITES]


def features(adapter: Any) -> tuple[int, int]:
    """Returns how many features the kernel reads and writes."""
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
      adapter: whose axes and rank say how.
      like: what has the factors' shapes, in their place.
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
    """Returns the adapter with these factors, in its own axes and dtypes.

    Args:
      adapter: of any rank.
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
    """Returns the adapter with the product `u @ diag(s) @ vt` in its factors.

    Args:
      adapter: of two factors, which get it balanced, or of three.
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
    """Returns the adapter with the best approximation of an update in its factors.

    By Eckart and Young these are the leading singular triplets.

    Args:
      adapter: of two factors, which get it balanced, or of three; of a stack it may
        have some layers.
      update: in the leaf's layout; of no other layers.

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

    A direction of size zero keeps its unit column in a, beside a zero row in b: with
    both zero no gradient would ever reach it.
    """
    s = s[..., None, :]
    root = jnp.sqrt(jnp.where(s > 0, s / abs(scale), 1.0))
    return Both(u * root, (s / (scale * root)).mT * vt)
