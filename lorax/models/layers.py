"""What the families share: attention with a cache, the stack of layers, positions.

Shapes: `[batch, time, ...]`; a cache has `length` slots, filled from slot 0 on, the
same ones for every sequence of the batch. Shorter prompts are padded on the left and
their padding is marked as not real.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

Remat = Literal["none", "full", "dots"]


@flax.struct.dataclass
class Cache:
    """Keys and values of the tokens read so far.

    Attributes:
      k: `[layers, batch, length, kv_heads, head_dim]`.
      v: likewise.
      real: bool `[batch, length]`; False: empty or padding.
      index: int32 []; the next free slot.
    """

    k: jax.Array
    v: jax.Array
    real: jax.Array
    index: jax.Array

    @property
    def length(self) -> int:
        """Number of slots."""
        return self.real.shape[1]

    def rows(self, index: jax.Array) -> Cache:
        """Returns the cache of these sequences, as a beam search reorders them."""
        return dataclasses.replace(
            self, k=self.k[:, index], v=self.v[:, index], real=self.real[index]
        )


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
    """The cache (if there is one) that knows of more tokens, not yet written.

    Args:
      cache: before them.
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
    """Which key each query sees, and how far back it lies.

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
            raise ValueError("segments (packed documents) and a cache exclude another")
        mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
    return mask, back


def padding_mask(tokens: jax.Array, real: jax.Array | None) -> jax.Array:
    """Which key every query sees: all that are real, bool `[1 or batch, 1, 1, time]`.

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
    """Returns each token's number among the real ones before it, int `[batch, time]`.

    Padding has position 0; nothing sees it.

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


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    bias: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Softmax attention, grouped queries included.

    Args:
      q: `[batch, time, heads, head_dim]`.
      k: `[batch, keys, kv_heads, head_dim]`.
      v: likewise.
      mask: bool, broadcasts to `[batch, heads, time, keys]`.
      bias: added to the scores, broadcasts likewise.
      scale: of the scores; None for `head_dim ** -0.5`.
    """
    return jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, scale=scale)


def remember(
    k: jax.Array,
    v: jax.Array,
    kept: tuple[jax.Array, jax.Array] | None,
    index: Any,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array] | None]:
    """Writes keys and values into one layer's cache and returns what to attend to.

    Args:
      k: `[batch, time, kv_heads, head_dim]` of the tokens being read.
      v: likewise.
      kept: keys and values of the cache, `[batch, length, kv_heads, head_dim]`.
      index: the slot of the first of these tokens.

    Returns:
      Keys, values, and the new cache of the layer.
    """
    if kept is None:
        return k, v, None
    put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(
        old, new.astype(old.dtype), index, axis=1
    )
    k, v = put(kept[0], k), put(kept[1], v)
    return k, v, (k, v)


def along_batch(x: jax.Array) -> jax.Array:
    """Cuts activations `[batch, ...]` along their batch alone, under `jax.set_mesh`.

    Where parameters are cut along "fsdp" too, the compiler could as well cut the width
    of the activations, and then every device holds the whole batch. Without a mesh of
    Auto axes "data" or "fsdp", or a batch that they divide: nothing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    auto = jax.sharding.AxisType.Auto
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    axes = tuple(axis for axis in ("data", "fsdp") if kinds.get(axis) == auto)
    if not axes or x.shape[0] % math.prod(mesh.shape[axis] for axis in axes):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes))


def run_layers(
    block: type[nn.Module],
    args: Sequence[Any],
    length: int,
    x: Any,
    own: Any,
    shared: Any,
    *,
    scan: bool,
    remat: Remat,
    name: str = "layers",
) -> tuple[Any, Any]:
    """Runs a stack of blocks `(x, own, shared) -> (x, out)`, inside a compact method.

    Args:
      block: the module's class.
      args: its arguments.
      length: number of layers.
      x: what flows through them.
      own: a tree of arrays with a leading axis of layers, a slice for each.
      shared: a tree that every layer gets whole.
      scan: one traced layer under `nn.scan`, whose leaves are stacked on axis 0 below
        `name`; else `length` of them, `name_0` and on.
      remat: "full": keep only what flows between layers; "dots": also the results of
        matrix products without batch axes.
      name: of the stack.

    Returns:
      The last x, and the outs with a leading axis of layers.
    """
    x = jax.tree.map(along_batch, x)
    if remat != "none":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        block = nn.remat(
            block, prevent_cse=not scan, policy=policy if remat == "dots" else None
        )
    if scan:
        return nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=length,
        )(*args, name=name)(x, own, shared)
    outs = []
    for layer in range(length):
        part = jax.tree.map(lambda leaf, layer=layer: leaf[layer], own)
        x, out = block(*args, name=f"{name}_{layer}")(x, part, shared)
        outs.append(out)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)


def projection(
    features: int | tuple[int, ...],
    name: str,
    config: Any,
    *,
    use_bias: bool = False,
    axis: int | tuple[int, ...] = -1,
) -> nn.DenseGeneral:
    """A linear map, its kernel `[*in, *out]` drawn from N(0, 0.02^2)."""
    return nn.DenseGeneral(
        features,
        axis=axis,
        use_bias=use_bias,
        kernel_init=nn.initializers.normal(0.02),
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        name=name,
    )


def embedding(rows: int, name: str, config: Any) -> nn.Embed:
    """An embedding `[rows, width]`, drawn from N(0, 0.02^2)."""
    return nn.Embed(
        rows,
        config.width,
        embedding_init=nn.initializers.normal(0.02),
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        name=name,
    )


def layer_norm(name: str, config: Any) -> nn.LayerNorm:
    """A layer norm, its variance computed in two passes: E[x^2] - E[x]^2 cancels."""
    return nn.LayerNorm(
        epsilon=config.eps,
        use_fast_variance=False,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        name=name,
    )


def rms_norm(name: str, config: Any) -> nn.RMSNorm:
    """An RMS norm with a scale."""
    return nn.RMSNorm(
        epsilon=config.eps,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        name=name,
    )


def head(x: jax.Array, embed: nn.Embed, config: Any) -> jax.Array:
    """Logits in float32, through the embedding where `config.tied`."""
    if config.tied:
        logits = embed.attend(x)
    else:
        logits = projection(config.vocabulary, "head", config)(x)
    return logits.astype(jnp.float32)
