"""The (a, b) pairs inside an adapter tree, as stacks of matrices.

Pair transforms need both factors of a kernel, and its scale, at once. They see every
Lora and Dora as `a: [n, in, rank]`, `b: [n, rank, out]` in at least float32, whatever
the axes of the leaf; `n` counts its layers, experts or slices. Other adapters pass
through. `_pairwise` applies them to a tree.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorax import linalg
from lorax.adapters.pairs import Both, factors_of, stacked
from lorax.types import PairStatics

Static = float | jax.Array
"""A pair's number: one for the whole stack, or `[n, 1, 1]` if its members differ."""


class Pair(NamedTuple):
    """Both factors of one adapter, or of its gradient or update.

    Attributes:
      a: `[n, in, rank]`, at least float32.
      b: `[n, rank, out]`, at least float32.
      scale: the factor on `a @ b`.
      rank: the true rank; less than `a.shape[-1]` if a population pads it.
    """

    a: jax.Array
    b: jax.Array
    scale: Static
    rank: Static


def pair_of(adapter: Any, statics: PairStatics | None = None) -> Pair:
    """Returns the factors as stacks of matrices.

    Args:
      adapter: a Lora or Dora of parameters, gradients or updates.
      statics: a population member's scale and rank; None for the adapter's own.
    """
    own = PairStatics(adapter.scale, adapter.rank) if statics is None else statics
    return Pair(*stacked(adapter), own.scale, own.rank)


def zeros(adapter: Any) -> Both:
    """Returns zeros in the factors' shapes, at least float32."""
    a, b = factors_of(adapter)
    return Both(zeros_like(a), zeros_like(b))


def zeros_like(factor: jax.Array) -> jax.Array:
    """Returns zeros in a factor's shape and sharding, at least float32."""
    return jnp.zeros_like(factor, linalg.wide(factor.dtype))
