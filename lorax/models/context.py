"""What queries see: a cache of earlier tokens, masks and positions.

Shapes: `[batch, time, ...]`; a cache has `length` slots, filled from slot 0 on, the
same ones for every sequence of the batch. Shorter prompts are padded on the left, and
padding is marked as not real.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp

from lorax import attention
from lorax.types import PyTree


@flax.struct.dataclass
class Cache:
    """Keys and values of the tokens read so far.

    Attributes:
      k: `[layers, batch, length, kv_heads, head_dim]`; several of these if layers
        differ in the sizes of their heads.
      v: likewise.
      real: bool `[batch, length]`; False: empty or padding.
      index: int32 []; the next free slot.
    """

    k: PyTree
    v: PyTree
    real: jax.Array
    index: jax.Array

    @property
    def length(self) -> int:
        """Number of slots."""
        return self.real.shape[1]

    def rows(self, index: jax.Array) -> Cache:
        """Returns the cache with sequences reordered by `index`, for beam search."""
        k, v = jax.tree.map(lambda leaf: leaf[:, index], (self.k, self.v))
        return dataclasses.replace(self, k=k, v=v, real=self.real[index])


def empty_cache(
    layers: int, batch: int, length: int, kv_heads: int, head_dim: int, dtype: Any
) -> Cache:
    """Returns a cache without tokens."""
    shape = layers, batch, length, kv_heads, head_dim
    return Cache(
        jnp.zeros(shape, dtype),
        jnp.zeros(shape, dtype),
        jnp.zeros((batch, length), bool),
        jnp.zeros((), jnp.int32),
    )


def announced(
    cache: Cache | None, tokens: jax.Array, real: jax.Array | None
) -> Cache | None:
    """Returns the cache, if any, with slots taken by tokens that are yet to be written.

    Args:
      cache: before these tokens.
      tokens: int `[batch, time]`.
      real: bool `[batch, time]`; None: all are real.
    """
    if cache is None:
        return None
    real = jnp.ones(tokens.shape, bool) if real is None else real
    at = (jnp.zeros((), jnp.int32), cache.index)
    return dataclasses.replace(
        cache,
        real=jax.lax.dynamic_update_slice(cache.real, real, at),
        index=cache.index + real.shape[1],
    )


def causal_mask(
    time: int, real: jax.Array | None, segments: jax.Array | None, cache: Cache | None
) -> tuple[jax.Array, jax.Array]:
    """Returns which keys each query sees, and how far back they are.

    Args:
      time: number of queries.
      real: bool `[batch, time]`, False for padding; None: all are real.
      segments: int `[batch, time]`, of packed documents, which do not see each other.
      cache: after `announced`; its slots are the keys.

    Returns:
      bool `[1 or batch, 1, time, keys]` and int `[time, keys]`.
    """
    keys = time if cache is None else cache.length
    start = 0 if cache is None else cache.index - time
    back = start + jnp.arange(time)[:, None] - jnp.arange(keys)[None]
    mask = (back >= 0)[None, None]
    known = real if cache is None else cache.real
    if known is not None:
        mask = mask & known[:, None, None, :]
    if segments is not None:
        if cache is not None:
            raise ValueError("segments (packed documents) do not work with a cache")
        mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
    return mask, back


def padding_mask(tokens: jax.Array, real: jax.Array | None) -> jax.Array:
    """Returns the keys that queries see: real ones, bool `[1 or batch, 1, 1, time]`.

    Args:
      tokens: int `[batch, time]`.
      real: bool `[batch, time]`; None: all are real.
    """
    if real is None:
        return jnp.ones((1, 1, 1, tokens.shape[1]), bool)
    return real[:, None, None, :]


def positions_of(
    tokens: jax.Array, real: jax.Array | None, cache: Cache | None
) -> jax.Array:
    """Returns how many real tokens precede each token, int `[batch, time]`.

    Padding on the left has position 0; nothing sees padding.

    Args:
      tokens: int `[batch, time]`.
      real: bool `[batch, time]`; None: all are real.
      cache: before `announced`; None: nothing was read before.
    """
    batch, time = tokens.shape
    before = jnp.zeros((batch, 1), jnp.int32)
    if cache is not None:
        before = jnp.sum(cache.real, axis=1, keepdims=True, dtype=jnp.int32)
    if real is None:
        return before + jnp.arange(time, dtype=jnp.int32)
    count = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
    return before + jnp.maximum(count, 0)


class Context(NamedTuple):
    """What a decoder knows about tokens before its first layer.

    Attributes:
      positions: int `[batch, time]`.
      mask: from `causal_mask`.
      back: from `causal_mask`.
      cache: after `announced`; None: no cache.
      slot: of the first token in the cache; None: no cache.
    """

    positions: jax.Array
    mask: jax.Array
    back: jax.Array
    cache: Cache | None
    slot: jax.Array | None

    @property
    def kept(self) -> tuple[PyTree, PyTree] | None:
        """Keys and values of the cache, of all layers."""
        return None if self.cache is None else (self.cache.k, self.cache.v)

    def shared(self, segments: jax.Array | None) -> dict[str, Any]:
        """Returns what every layer receives; see `layers.attend`.

        Args:
          segments: int `[batch, time]`; padding is a segment of its own.
        """
        told = {"mask": self.mask, "back": self.back, "slot": self.slot}
        return {"segments": segments, **told}

    def result(self, logits: jax.Array, kept: Any) -> Any:
        """Returns the logits; with a cache, also the new cache, which holds `kept`."""
        if self.cache is None:
            return logits
        return logits, dataclasses.replace(self.cache, k=kept[0], v=kept[1])


def of(
    tokens: jax.Array,
    *,
    positions: jax.Array | None,
    real: jax.Array | None,
    segments: jax.Array | None,
    cache: Cache | None,
) -> Context:
    """Returns the context of tokens; the arguments are those of the models."""
    if positions is None:
        positions = positions_of(tokens, real, cache)
    slot = None if cache is None else cache.index
    cache = announced(cache, tokens, real)
    mask, back = causal_mask(tokens.shape[1], real, segments, cache)
    return Context(positions, mask, back, cache, slot)


class Stripable(Protocol):
    """What `rows` needs from a family's Config."""

    @property
    def striped(self) -> bool:
        """Whether devices along "context" share rows; see `attention.stripe`."""


class Rows(NamedTuple):
    """What a decoder's first layer reads, in stripes where devices share rows.

    Attributes:
      tokens: int `[batch, time]`.
      positions: likewise.
      shared: what every layer receives.
      seen: context of the tokens in their own order.
      striped: whether the tokens are in stripes.
    """

    tokens: jax.Array
    positions: jax.Array
    shared: dict[str, Any]
    seen: Context
    striped: bool

    def result(self, x: jax.Array, last_only: bool) -> jax.Array:
        """Returns the output of the last layer in the tokens' own order.

        Args:
          x: `[batch, time, width]`.
          last_only: keep only the last token.
        """
        x = attention.unstripe(x) if self.striped else x
        return x[:, -1:] if last_only else x


def rows(
    tokens: jax.Array,
    config: Stripable,
    *,
    positions: jax.Array | None,
    real: jax.Array | None,
    segments: jax.Array | None,
    cache: Cache | None,
) -> Rows:
    """Returns what the first layer reads; the arguments are those of the models."""
    seen = of(tokens, positions=positions, real=real, segments=segments, cache=cache)
    own = tokens, seen.positions, attention.segments_of(real, segments)
    striped = config.striped and cache is None and tokens.shape[1] > 1
    if striped:
        own = jax.tree.map(attention.stripe, own)
    tokens, places, segments = own
    return Rows(tokens, places, seen.shared(segments), seen, striped)
