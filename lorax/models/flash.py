"""Causal attention that never forms its scores: JAX's Pallas kernel for TPUs.

Compiled by the planner; its values are checked on the CPU, by Pallas's interpreter.
Never run on a TPU, and there is no form of it for GPUs.

References:
  Dao, FlashAttention-2, arXiv:2307.08691. `jax.experimental.pallas.ops.tpu`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import flash_attention as kernel
from jax.sharding import AxisType, PartitionSpec

BLOCK = 512
"""Longest tile along time; the kernel's own 128 reads keys and values more often."""


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None = None
) -> jax.Array:
    """Returns what `layers.attend` does under a causal mask, in memory linear in time.

    Under `jax.set_mesh` every device takes its own rows of the batch ("data", "fsdp")
    and its own heads ("tensor"): the compiler cannot cut the kernel by itself.

    Args:
      q: `[batch, time, heads, head_dim]`; time is a multiple of 128.
      k: `[batch, time, kv_heads, head_dim]`.
      v: likewise.
      segments: int `[batch, time]`; a query sees keys of its own segment alone.

    Raises:
      ValueError: another time.
    """
    time, shared = q.shape[1], q.shape[2] // k.shape[2]
    if time % 128:
        raise ValueError(
            f"attention='flash' needs a multiple of 128 tokens, not {time}; pad the "
            "batch (data.lengths), or use attention='plain'"
        )
    if segments is None:
        segments = jnp.zeros(q.shape[:2], jnp.int32)
    k, v = (jnp.repeat(x, shared, axis=2) for x in (k, v))
    heads_first = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    mixed = _everywhere(_own)(*heads_first, segments)
    return mixed.transpose(0, 2, 1, 3)


def segments_of(real: jax.Array | None, segments: jax.Array | None) -> jax.Array | None:
    """Returns segments in which padding is one of its own; None: all is one.

    Args:
      real: bool `[batch, time]`, False for padding; None: all are real.
      segments: int `[batch, time]`, of packed documents; None: one.
    """
    if real is None:
        return segments
    return jnp.where(real, 0 if segments is None else segments, -1)


def _own(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """The kernel on one device: `[batch, heads, time, head_dim]`."""
    block = next(n for n in (BLOCK, 256, 128) if q.shape[2] % n == 0)
    names = (
        "block_q block_k_major block_k block_q_major_dkv block_k_major_dkv "
        "block_k_dkv block_q_dkv block_k_major_dq block_k_dq block_q_dq"
    ).split()
    sizes = kernel.BlockSizes(block_b=1, **dict.fromkeys(names, block))
    return kernel.flash_attention(
        q,
        k,
        v,
        segment_ids=kernel.SegmentIds(segments, segments),
        causal=True,
        sm_scale=q.shape[-1] ** -0.5,
        block_sizes=sizes,
    )


def _everywhere(own: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`own` on every device's part of the batch and of the heads."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    auto = [axis for axis in kinds if kinds[axis] == AxisType.Auto]
    rows = tuple(axis for axis in ("data", "fsdp") if axis in auto)
    if not rows:
        return own
    spec = PartitionSpec(rows, "tensor" if "tensor" in auto else None, None, None)
    return jax.shard_map(
        own,
        in_specs=(spec, spec, spec, PartitionSpec(rows, None)),
        out_specs=spec,
        check_vma=False,
    )
