"""What the families share: attention with a cache, the stack of layers, positions.

Shapes: `[batch, time, ...]`; a cache has `length` slots, filled from slot 0 on, the
same ones for every sequence of the batch. Shorter prompts are padded on the left and
their padding is marked as not real.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lorax.types import PyTree

Remat = Literal["none", "full", "dots"]


class Sizes(Protocol):
    """What the parts below read of a family's Config."""

    @property
    def width(self) -> int:
        """Of the residual stream."""

    @property
    def eps(self) -> float:
        """Of the norms."""

    @property
    def scan(self) -> bool:
        """Layers are stacked on axis 0."""

    @property
    def remat(self) -> Remat:
        """See `run_layers`."""

    @property
    def dtype(self) -> Any:
        """Of the computation."""

    @property
    def param_dtype(self) -> Any:
        """Of the parameters."""


class DecoderSizes(Sizes, Protocol):
    """And of a decoder's."""

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""

    @property
    def tied(self) -> bool:
        """The head is the embedding."""


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


class Reading(NamedTuple):
    """What a decoder knows of tokens before its first layer.

    Attributes:
      positions: int `[batch, time]`.
      mask: of `causal_mask`.
      back: of `causal_mask`.
      cache: that knows of the tokens; None without one.
      slot: of the first of them in the cache; None without one.
    """

    positions: jax.Array
    mask: jax.Array
    back: jax.Array
    cache: Cache | None
    slot: jax.Array | None

    @property
    def kept(self) -> tuple[jax.Array, jax.Array] | None:
        """Keys and values of the cache, of all layers."""
        return None if self.cache is None else (self.cache.k, self.cache.v)

    def result(self, logits: jax.Array, kept: Any) -> Any:
        """Returns the logits, with a cache also the new one, which holds `kept`."""
        if self.cache is None:
            return logits
        return logits, dataclasses.replace(self.cache, k=kept[0], v=kept[1])


def reading(
    tokens: jax.Array,
    *,
    positions: jax.Array | None,
    real: jax.Array | None,
    segments: jax.Array | None,
    cache: Cache | None,
) -> Reading:
    """Returns what is known of tokens; the arguments are those of the models."""
    if positions is None:
        positions = positions_of(tokens, real, cache)
    slot = None if cache is None else cache.index
    cache = announced(cache, tokens, real)
    mask, back = causal_mask(tokens.shape[1], real, segments, cache)
    return Reading(positions, mask, back, cache, slot)


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

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        new = new.astype(old.dtype)
        return jax.lax.dynamic_update_slice_in_dim(old, new, index, axis=1)

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
    config: Sizes,
    x: jax.Array,
    own: PyTree,
    shared: PyTree,
    *,
    length: int,
    options: Sequence[Any] = (),
) -> tuple[jax.Array, PyTree]:
    """Runs a stack of blocks `(x, own, shared) -> (x, out)`, inside a compact method.

    With `config.scan` it is one traced layer under `nn.scan`, whose leaves are stacked
    on axis 0 below `layers`; else `length` of them, `layers_0` and on. What is kept for
    the backward pass, by `config.remat`: "none": all; "full": only what flows between
    layers; "dots": also the results of matrix products without batch axes.

    Args:
      block: the module's class, called with the config and the options.
      config: of the family.
      x: what flows through the layers.
      own: a tree of arrays with a leading axis of layers, a slice for each.
      shared: a tree that every layer gets whole.
      length: number of layers.
      options: further arguments of the block.

    Returns:
      The last x, and the outs with a leading axis of layers.
    """
    x = along_batch(x)
    if config.remat != "none":
        dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        policy = dots if config.remat == "dots" else None
        block = nn.remat(block, prevent_cse=not config.scan, policy=policy)
    if config.scan:
        return nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=length,
        )(config, *options, name="layers")(x, own, shared)
    outs = []
    for layer in range(length):
        part = jax.tree.map(lambda leaf, layer=layer: leaf[layer], own)
        x, out = block(config, *options, name=f"layers_{layer}")(x, part, shared)
        outs.append(out)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)


def projection(
    features: int | tuple[int, ...],
    name: str,
    config: Sizes,
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


def embedding(rows: int, name: str, config: Sizes) -> nn.Embed:
    """An embedding `[rows, width]`, drawn from N(0, 0.02^2)."""
    return nn.Embed(
        rows,
        config.width,
        embedding_init=nn.initializers.normal(0.02),
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        name=name,
    )


def layer_norm(name: str, config: Sizes) -> nn.LayerNorm:
    """A layer norm, its variance computed in two passes: E[x^2] - E[x]^2 cancels."""
    return nn.LayerNorm(
        epsilon=config.eps,
        use_fast_variance=False,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        name=name,
    )


def rms_norm(name: str, config: Sizes) -> nn.RMSNorm:
    """An RMS norm with a scale."""
    return nn.RMSNorm(
        epsilon=config.eps,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        name=name,
    )


def head(x: jax.Array, embed: nn.Embed, config: DecoderSizes) -> jax.Array:
    """Logits in float32, through the embedding where `config.tied`."""
    if config.tied:
        logits = embed.attend(x)
    else:
        logits = projection(config.vocabulary, "head", config)(x)
    return logits.astype(jnp.float32)
