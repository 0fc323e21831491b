"""Attention that forms its scores, `[batch, heads, time, keys]`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from lorax.attention.rule import Given, Rule, capped, seen

PRECISION = {
    jnp.dtype(jnp.bfloat16): jax.lax.DotAlgorithmPreset.BF16_BF16_F32,
    jnp.dtype(jnp.float16): jax.lax.DotAlgorithmPreset.F16_F16_F32,
}
"""So that the backward pass multiplies in the same dtype as the forward pass."""


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rule: Rule,
    given: Given,
    queries: jax.Array | None = None,
) -> jax.Array:
    """Computes `attention.attend` for all the queries or for some of them.

    Args:
      q: `[batch, time, heads, head_dim]`.
      k: `[batch, keys, kv_heads, head_dim]`; consecutive query heads share a key head.
      v: likewise.
      rule: static.
      given: of these queries and all the keys.
      queries: int `[time]`, their positions among the keys; None: the first ones.
    """
    batch, time, heads, size = q.shape
    keys, kv_heads = k.shape[1:3]
    if queries is None:
        queries = jnp.arange(time)
    mask = seen(rule, given, queries, jnp.arange(keys))
    grouped = q.reshape(batch, time, kv_heads, heads // kv_heads, size)
    extra = [_of_groups(x, kv_heads) for x in (mask, given.bias)]
    of_group = functools.partial(_of_group, k=k, v=v, rule=rule)
    axes = (3, *(2 if x is not None and x.shape[2] > 1 else None for x in extra))
    extra = [
        x if axis else _squeezed(x) for x, axis in zip(extra, axes[1:], strict=True)
    ]
    # one product per member of the group: on a CPU twice as fast as one for them all
    mixed = jax.vmap(of_group, in_axes=axes, out_axes=3)(grouped, *extra)
    return mixed.reshape(q.shape)


def _of_group(
    q: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    *,
    k: jax.Array,
    v: jax.Array,
    rule: Rule,
) -> jax.Array:
    """Attention with as many query heads as key heads."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum(
        "btkh,bskh->bkts",
        q,
        k,
        precision=PRECISION.get(q.dtype),
        preferred_element_type=wide,
    )
    scores = capped(scores * jnp.asarray(rule.scale, wide), rule.soft_cap)
    if bias is not None:
        scores += bias.astype(wide)
    if mask is not None:
        scores = jnp.where(mask, scores, 0.7 * jnp.finfo(wide).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(k.dtype)
    return jnp.einsum("bkts,bskh->btkh", weights, v)


def _of_groups(x: jax.Array | None, kv_heads: int) -> jax.Array | None:
    """Reshapes a mask or bias of heads to `[batch, kv_heads, group, ...]`."""
    if x is None:
        return None
    x = x[(None,) * (4 - x.ndim)]
    if x.shape[1] == 1:
        return x[:, :, None]
    return x.reshape(x.shape[0], kv_heads, -1, *x.shape[2:])


def _squeezed(x: jax.Array | None) -> jax.Array | None:
    """Drops the group axis, of length one."""
    return None if x is None else x[:, :, 0]
