"""JAX's splash kernel, for TPUs: only one tile's scores are held, in on-chip memory.

Grouped heads share a tile of keys and values, and tiles that none of their queries sees
are never read. The planner compiles it, and its values are checked on the CPU by
Pallas's interpreter; it has never run on a TPU.

References:
  Dao, FlashAttention-2, arXiv:2307.08691.
  `jax.experimental.pallas.ops.tpu.splash_attention`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.experimental.pallas.ops.tpu import splash_attention as kernel
from jax.sharding import PartitionSpec

from lorax.attention import machine
from lorax.attention.rule import NAME, Given, Rule

LANES = 128
"""Tiles are multiples of this along time."""
TILES = ((128, 512), (256, 256))
"""`(head_dim, tile)`: longest tile along time for heads up to this wide.

A float32 tile of scores at 512 is 1 MiB; the backward pass holds four at once, beside
its operands, in 16 MiB. MaxText trains with 512.
"""


def refusal(q: jax.Array, k: jax.Array, rule: Rule, given: Given) -> str | None:
    """Returns why the kernel does not support this; None: it does."""
    if given.mask is not None or given.bias is not None:
        return "it supports segments, causality and windows, but no mask and no bias"
    for name, time in (("queries", q.shape[1]), ("keys", k.shape[1])):
        if time % LANES:
            return f"it needs a multiple of {LANES} {name}, not {time} (data.lengths)"
    if q.shape[-1] > TILES[-1][0]:
        return f"head_dim must be at most {TILES[-1][0]}, not {q.shape[-1]}"
    if rule.causal and q.shape[1] != k.shape[1]:
        return f"{q.shape[1]} queries are not at the positions of {k.shape[1]} keys"
    return None


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, rule: Rule, given: Given
) -> jax.Array:
    """Computes the same as `plain.attend`.

    Under `jax.set_mesh` every device takes its own rows of the batch (`machine.ROWS`)
    and its own heads ("tensor"): the compiler cannot shard the kernel by itself.
    """
    q = (q * rule.scale).astype(q.dtype)
    rows, heads, k, v = machine.spread(q, k, v)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))

    def own(q: jax.Array, k: jax.Array, v: jax.Array, ids: Any) -> jax.Array:
        run = _kernel(q.shape[1:3], k.shape[2], q.shape[3], rule)
        return jax.vmap(run)(q, k, v, ids)

    ids = None if given.segments is None else kernel.SegmentIds(*given.segments)
    if rows or heads:
        spec = PartitionSpec(rows or None, heads or None)
        own = jax.shard_map(
            own,
            in_specs=(spec, spec, spec, PartitionSpec(rows or None)),
            out_specs=spec,
            check_vma=False,
        )
    return own(q, k, v, ids).transpose(0, 2, 1, 3)


def _kernel(queries: tuple[int, ...], keys: int, size: int, rule: Rule) -> Any:
    """The kernel of `[heads, time, head_dim]`, for one row of a batch.

    Args:
      queries: heads, and number of queries.
      keys: number of keys.
      size: head_dim.
      rule: static.
    """
    heads, time = queries
    shape = time, keys
    mask: kernel.Mask
    if not rule.causal:
        mask = kernel.FullMask(shape)
    elif rule.window is None:
        mask = kernel.CausalMask(shape)
    else:
        mask = kernel.LocalMask(shape, (rule.window - 1, 0), 0)
    most = next(tile for widest, tile in TILES if size <= widest)
    tile_q, tile_k = (math.gcd(most, n) for n in shape)
    sizes = kernel.BlockSizes(
        block_q=tile_q,
        block_kv=tile_k,
        block_q_dkv=tile_q,
        block_kv_dkv=tile_k,
        block_q_dq=tile_q,
        block_kv_dq=tile_k,
    )
    return kernel.make_splash_mha(
        kernel.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        attn_logits_soft_cap=rule.soft_cap,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=NAME,
        interpret=machine.platform() != "tpu",
    )
