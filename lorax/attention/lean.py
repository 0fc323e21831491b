"""Attention by chunks of queries: only one chunk's scores are held at a time.

The backward pass recomputes each chunk's scores.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from lorax.attention import plain
from lorax.attention.rule import Given, Rule

CHUNK = 256
"""Queries in a chunk: at 4,096 keys, its scores are 4 MiB per head."""


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, rule: Rule, given: Given
) -> jax.Array:
    """Computes the same as `plain.attend`."""
    time = q.shape[1]
    if time <= CHUNK:
        return plain.attend(q, k, v, rule, given)

    @jax.checkpoint
    def part(start: jax.Array) -> jax.Array:
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, axis=1)
        segments = given.segments
        if segments is not None:
            segments = cut(segments[0], start, CHUNK), segments[1]
        own = Given(segments, _rows(given.mask, start), _rows(given.bias, start))
        rows = cut(q, start, CHUNK)
        return plain.attend(rows, k, v, rule, own, start + jnp.arange(CHUNK))

    # the last chunk ends where the queries do and overlaps with the one before
    starts = jnp.minimum(jnp.arange(0, time, CHUNK), time - CHUNK)
    parts = jax.lax.map(part, starts)  # [chunks, batch, CHUNK, heads, head_dim]
    whole = time // CHUNK * CHUNK
    mixed = (
        parts[: time // CHUNK].swapaxes(0, 1).reshape(q.shape[0], whole, *q.shape[2:])
    )
    return (
        jnp.concatenate([mixed, parts[-1][:, whole - time :]], 1)
        if whole < time
        else mixed
    )


def _rows(x: jax.Array | None, start: jax.Array) -> jax.Array | None:
    """A chunk's rows of an array that broadcasts to `[batch, heads, time, keys]`."""
    if x is None or x.ndim < 2 or x.shape[-2] == 1:
        return x
    return jax.lax.dynamic_slice_in_dim(x, start, CHUNK, axis=-2)
