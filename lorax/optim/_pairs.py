"""The (a, b) pairs inside an adapter tree, as stacks of matrices.

Pair transforms need both factors of one kernel, and its scale, at once. They see every
Lora and Dora as `a: [n, in, rank]`, `b: [n, rank, out]` in float32, whatever the axes
of the leaf, and `n` the layers, experts or slices in it; other adapters pass. How they
are applied to a tree is `_pairwise`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorax import linalg
from lorax.adapters.pairs import Both, factors_of, stacked
from lorax.types import PairStatics

Static = float | jax.Array
"""A number of a pair: one for all, or `[n, 1, 1]` where members of a stack differ."""


class Pair(NamedTuple):
    """Both factors of one adapter, or of its gradient or update.

    Attributes:
      a: `[n, in, rank]`, at least float32.
      b: `[n, rank, out]`, likewise.
      scale: the factor on `a @ b`.
      rank: the true rank; less than `a.shape[-1]` where a population pads it.
    """

    a: jax.Array
    b: jax.Array
    scale: Static
    rank: Static


def pair_of(adapter: Any, statics: PairStatics | None = None) -> Pair:
    """Returns the factors as stacks of matrices.

    Args:
      adapter: a Lora or Dora of parameters, gradients or updates.
      statics: scale and rank of this member of a population; None: the adapter's own.
    """
    own = PairStatics(adapter.scale, adapter.rank) if statics is None else statics
    return Pair(*stacked(adapter), own.scale, own.rank)


def zeros(adapter: Any) -> Both:
    """Returns zeros of the factors' shapes, at least float32."""
    a, b = factors_of(adapter)
    return Both(zeros_like(a), zeros_like(b))


def zeros_like(factor: jax.Array) -> jax.Array:
    """Returns zeros of one factor's shape, at least float32, sharded alike."""
    return jnp.zeros_like(factor, linalg.wide(factor.dtype))
