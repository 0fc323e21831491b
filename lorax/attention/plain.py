"""Attention that forms its scores, `[batch, heads, time, keys]`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lorax.attention.rule import Given, Rule, capped, seen

PRECISION = {
    jnp.dtype(jnp.bfloat16): jax.lax.DotAlgorithmPreset.BF16_BF16_F32,
    jnp.dtype(jnp.float16): jax.lax.DotAlgorithmPreset.F16_F16_F32,
}
"""So that the backward pass multiplies what the forward pass does."""


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rule: Rule,
    given: Given,
    queries: jax.Array | None = None,
) -> jax.Array:
    """Returns `attention.attend`, of all the queries or of some of them.

    Args:
      q: `[batch, time, heads, head_dim]`.
      k: `[batch, keys, kv_heads, head_dim]`; heads of the queries share them in turn.
      v: likewise.
      rule: static.
      given: of these queries and all the keys.
      queries: int `[time]`, their places among the keys; None: they are the first.
    """
    batch, time, heads, size = q.shape
    keys, kv_heads = k.shape[1:3]
    if queries is None:
        queries = jnp.arange(time)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    grouped = q.reshape(batch, time, kv_heads, heads // kv_heads, size)
    scores = jnp.einsum(
        "btkgh,bskh->bkgts",
        grouped,
        k,
        precision=PRECISION.get(q.dtype),
        preferred_element_type=wide,
    )
    scores = capped(scores * jnp.asarray(rule.scale, wide), rule.soft_cap)
    if given.bias is not None:
        scores += _of_groups(given.bias, kv_heads).astype(wide)
    mask = seen(rule, given, queries, jnp.arange(keys))
    if mask is not None:
        least = 0.7 * jnp.finfo(wide).min
        scores = jnp.where(_of_groups(mask, kv_heads), scores, least)
    weights = jax.nn.softmax(scores, axis=-1).astype(k.dtype)
    mixed = jnp.einsum("bkgts,bskh->btkgh", weights, v)
    return mixed.reshape(batch, time, heads, size)


def _of_groups(x: jax.Array, kv_heads: int) -> jax.Array:
    """What broadcasts to `[batch, heads, ...]`, to `[batch, kv_heads, group, ...]`."""
    x = x[(None,) * (4 - x.ndim)]
    if x.shape[1] == 1:
        return x[:, :, None]
    return x.reshape(x.shape[0], kv_heads, -1, *x.shape[2:])
