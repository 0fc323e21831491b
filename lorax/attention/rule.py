"""Which keys a query sees and what becomes of their scores: shared by every form.

score   = soft_cap tanh(scale q k / soft_cap) + bias
weights = softmax over the keys that are seen
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

NAME = "attention"
"""Of what a kernel keeps for its backward pass, for `jax.checkpoint`'s policies."""


class Rule(NamedTuple):
    """What a program knows of attention before it sees any data.

    Attributes:
      scale: of the scores.
      causal: a query sees no key behind it.
      window: and of those before it this many, itself included; None for all.
      soft_cap: bound of the scores; None for none.
    """

    scale: float
    causal: bool = False
    window: int | None = None
    soft_cap: float | None = None


class Given(NamedTuple):
    """The arrays that say more.

    Attributes:
      segments: of the queries, int `[batch, time]`, and of the keys, `[batch, keys]`;
        a query sees keys of its own segment alone.
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
      queries: int `[time]`, the queries' places.
      keys: int `[keys]`.

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
