"""Which keys a query sees, and their scores: shared by all implementations.

score   = soft_cap tanh(scale q k / soft_cap) + bias
weights = softmax over the keys that are seen
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

NAME = "attention"
"""Names what a kernel keeps for its backward pass, for `jax.checkpoint` policies."""


class Rule(NamedTuple):
    """The static options of attention.

    Attributes:
      scale: of the scores.
      causal: a query sees no later key.
      window: how many of the last keys a query sees, its own included; None for all.
      soft_cap: bound on the scores; None for no bound.
    """

    scale: float
    causal: bool = False
    window: int | None = None
    soft_cap: float | None = None


class Given(NamedTuple):
    """The arrays that mask or bias the scores.

    Attributes:
      segments: of the queries, int `[batch, time]`, and of the keys, `[batch, keys]`;
        a query sees only keys of its own segment.
      mask: bool, broadcasts to `[batch, heads, time, keys]`; False: not seen.
      bias: added to the scores, broadcasts likewise.
    """

    segments: tuple[jax.Array, jax.Array] | None = None
    mask: jax.Array | None = None
    bias: jax.Array | None = None


def seen(
    rule: Rule, given: Given, queries: jax.Array, keys: jax.Array
) -> jax.Array | None:
    """Returns which keys each query sees; None: all.

    Args:
      rule: static.
      given: of these queries and keys.
      queries: int `[time]`, the queries' positions.
      keys: int `[keys]`, the keys' positions.

    Returns:
      bool, broadcasts to `[batch, heads, time, keys]`.
    """
    found = given.mask
    if rule.causal:
        back = queries[:, None] - keys[None]
        near = back >= 0
        if rule.window is not None:
            near = near & (back < rule.window)
        found = _both(found, near[None, None])
    if given.segments is not None:
        own, other = given.segments
        found = _both(found, (own[:, :, None] == other[:, None])[:, None])
    return found


def _both(one: jax.Array | None, other: jax.Array) -> jax.Array:
    return other if one is None else one & other


def capped(scores: jax.Array, soft_cap: float | None) -> jax.Array:
    """Returns scores between `-soft_cap` and `soft_cap`."""
    if soft_cap is None:
        return scores
    return soft_cap * jnp.tanh(scores / soft_cap)
