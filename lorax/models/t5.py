"""T5: an encoder, and a decoder that reads it; positions are a bias on the scores.

The distance between query and key falls into a bucket, and each attention head learns a
bias per bucket, shared by all layers of a stack. Scores are not scaled by the head's
size. If the output head is the embedding, its input is scaled by `width ** -0.5`.

References:
  Raffel et al., Exploring the Limits of Transfer Learning with a Unified Text-to-Text
  Transformer, arXiv:1910.10683. Version 1.1: Shazeer, arXiv:2002.05202.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lorax import attention, losses
from lorax.models import context, hf_config, layers, remat, t5_config

Config = t5_config.Config
entries = t5_config.entries
ALIASES = ()
IGNORED = t5_config.IGNORED


@flax.struct.dataclass
class Cache:
    """What a decoder keeps between calls.

    Attributes:
      own: keys and values of the targets read so far.
      k: of the inputs, `[layers, batch, inputs, heads, head_dim]`.
      v: likewise.
      real: bool `[batch, inputs]`, False for padding.
    """

    own: context.Cache
    k: jax.Array
    v: jax.Array
    real: jax.Array

    def rows(self, index: jax.Array) -> Cache:
        """Returns the cache with sequences reordered by `index`, for beam search."""
        return Cache(
            self.own.rows(index), self.k[:, index], self.v[:, index], self.real[index]
        )


INPUTS = 2
"""Number of arrays of tokens that the model is called with."""


def shift_right(targets: jax.Array, config: Config) -> jax.Array:
    """Returns what the decoder reads to predict `targets`, int `[batch, time]`."""
    start = jnp.full_like(targets[:, :1], config.start)
    return jnp.concatenate([start, targets[:, :-1]], axis=1)


def bucket_of(back: jax.Array, config: Config, *, causal: bool) -> jax.Array:
    """Returns the bucket of each pair of query and key.

    The first half of the buckets hold one distance each; the others grow in logarithmic
    steps up to `max_distance`. The table is made on the host, because logarithms on
    accelerators round differently at the edges.

    Args:
      back: int, how far the key is behind the query.
      config: has the number of buckets and the largest distance.
      causal: there are no later keys; otherwise half of the buckets are for them.
    """
    count = config.buckets if causal else config.buckets // 2
    exact = count // 2
    distances = np.arange(config.max_distance + 1)
    ratio = np.log(np.maximum(distances, exact).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(config.max_distance / exact))
    steps = exact + (ratio * np.float32(count - exact)).astype(np.int32)
    steps = np.where(distances < exact, distances, np.minimum(steps, count - 1))
    distance = jnp.maximum(back, 0) if causal else jnp.abs(back)
    found = jnp.asarray(steps, jnp.int32)[jnp.minimum(distance, config.max_distance)]
    return found if causal else found + count * (back < 0)


_MIXING = ("q", "k", "v", "attention", "o")
NAMES = ("input", *_MIXING, *(f"cross_{n}" for n in _MIXING), "gate", "up", "down")
"""Names of a layer's tensors, for `remat`; an encoder has none with cross_."""


class Block(nn.Module):
    """One layer; see `layers.run_layers` for its arguments."""

    config: Config
    cross: bool = False
    deterministic: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, own: Any, shared: Any) -> tuple[jax.Array, Any]:
        """Returns the next residual stream and the layer's cache."""
        config = self.config
        x = remat.named(x, "input")
        h = self._norm("norm_attn")(x)
        q, k, v = (self._heads(name)(h) for name in ("q", "k", "v"))
        k, v, kept = layers.remember(k, v, own["cache"], shared["slot"])
        mixed = attention.attend(
            q, k, v, mask=shared["mask"], bias=shared["bias"], scale=1.0
        )
        mixed = remat.named(mixed, "attention")
        x = x + self._drop(self._out("o")(mixed))
        pair = None
        if self.cross:
            pair = own["pair"]
            if shared["encoded"] is not None:
                names = "cross_k", "cross_v"
                pair = tuple(self._heads(name)(shared["encoded"]) for name in names)
            q = self._heads("cross_q")(self._norm("norm_cross")(x))
            k, v = pair
            mixed = attention.attend(q, k, v, mask=shared["cross_mask"], scale=1.0)
            mixed = remat.named(mixed, "cross_attention")
            x = x + self._drop(self._out("cross_o")(mixed))
        h = self._norm("norm_mlp")(x)
        up = layers.projection(config.hidden, "up", config)(h)
        if config.gated:
            gate = layers.projection(config.hidden, "gate", config)(h)
            h = hf_config.ACTIVATIONS[config.activation](gate) * up
        else:
            h = hf_config.ACTIVATIONS[config.activation](up)
        h = layers.projection(config.width, "down", config)(h)
        # without a cache, the pair is not kept
        return x + self._drop(h), None if kept is None else (kept, pair)

    def _heads(self, name: str) -> nn.Module:
        size = self.config.heads, self.config.head_dim
        return layers.projection(size, name, self.config)

    def _out(self, name: str) -> nn.Module:
        return layers.projection(self.config.width, name, self.config, axis=(-2, -1))

    def _norm(self, name: str) -> nn.RMSNorm:
        return layers.rms_norm(name, self.config)

    def _drop(self, x: jax.Array) -> jax.Array:
        return nn.Dropout(self.config.dropout, deterministic=self.deterministic)(x)


class Stack(nn.Module):
    """The encoder or, with `cross`, the decoder; from embeddings on."""

    config: Config
    cross: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, back: jax.Array, own: Any, shared: Any, deterministic: bool
    ) -> tuple[jax.Array, Any]:
        """Runs the layers and the last norm; `own` and `shared` are for the blocks."""
        config = self.config
        drop = nn.Dropout(config.dropout, deterministic=deterministic)
        bias = nn.Embed(
            config.buckets,
            config.heads,
            embedding_init=nn.initializers.normal(0.02),
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            name="relative_bias",
        )(bucket_of(back, config, causal=self.cross))  # [time, keys, heads]
        x, kept = layers.run_layers(
            Block,
            config,
            drop(x),
            own,
            {"bias": jnp.moveaxis(bias, -1, 0)[None], **shared},
            length=config.decoder_layers if self.cross else config.layers,
            names=NAMES,
            options=(self.cross, deterministic),
        )
        return drop(layers.rms_norm("norm_out", config)(x)), kept


class Model(nn.Module):
    """Maps inputs and the targets so far to logits of the next target."""

    config: Config

    def setup(self) -> None:
        """Names the parts."""
        config = self.config
        self.embed = layers.embedding(config.vocabulary, "embed", config)
        self.encoder = Stack(config, name="encoder")
        self.decoder = Stack(config, cross=True, name="decoder")
        if not config.tied:
            self.head = layers.projection(config.vocabulary, "head", config)

    def __call__(
        self,
        inputs: jax.Array | None,
        targets_in: jax.Array,
        *,
        real: jax.Array | None = None,
        target_real: jax.Array | None = None,
        encoded: jax.Array | None = None,
        cache: Cache | None = None,
        deterministic: bool = True,
        hidden: bool = False,
    ) -> Any:
        """Reads inputs and targets.

        Args:
          inputs: int `[batch, inputs]`; None: they are in `encoded` or the cache.
          targets_in: int `[batch, time]`, the targets after `shift_right`.
          real: bool `[batch, inputs]`, False for padding; None: all are real.
          target_real: likewise for the targets.
          encoded: from `encode`, instead of inputs.
          cache: from `cache`. The first call also gets inputs, or what they encode to,
            and keeps their keys and values; later calls get neither.
          deterministic: True disables dropout.
          hidden: return what the head reads, `[batch, time, width]`, not logits.

        Returns:
          Logits `[batch, time, vocabulary]`, float32; with a cache, also the new cache.
        """
        if inputs is not None:
            encoded = self.encode(inputs, real=real, deterministic=deterministic)
        return self.decode(
            targets_in,
            encoded,
            real=real,
            target_real=target_real,
            cache=cache,
            deterministic=deterministic,
            hidden=hidden,
        )

    def encode(
        self,
        inputs: jax.Array,
        *,
        real: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Returns what the decoder reads, `[batch, inputs, width]`."""
        step = jnp.arange(inputs.shape[1])
        back = step[:, None] - step[None]
        shared = {"mask": context.padding_mask(inputs, real), "slot": None}
        own = {"cache": None}
        return self.encoder(self.embed(inputs), back, own, shared, deterministic)[0]

    def decode(
        self,
        targets_in: jax.Array,
        encoded: jax.Array | None,
        *,
        real: jax.Array | None = None,
        target_real: jax.Array | None = None,
        cache: Cache | None = None,
        deterministic: bool = True,
        hidden: bool = False,
    ) -> Any:
        """Reads targets; see `__call__` for arguments and results."""
        before = None if cache is None else cache.own
        after = context.announced(before, targets_in, target_real)
        mask, back = context.causal_mask(targets_in.shape[1], target_real, None, after)
        if encoded is not None:
            pair, cross_mask = None, context.padding_mask(encoded, real)
        elif cache is not None:
            pair, cross_mask = (cache.k, cache.v), cache.real[:, None, None, :]
        else:
            raise ValueError("no inputs: give inputs, encoded, or a cache of them")
        shared = {
            "mask": mask,
            "slot": None if before is None else before.index,
            "encoded": encoded,
            "cross_mask": cross_mask,
        }
        kept = None if before is None else (before.k, before.v)
        own = {"cache": kept, "pair": pair}
        x = self.embed(targets_in)
        x, kept = self.decoder(x, back, own, shared, deterministic)
        if self.config.tied:
            x = x * self.config.width**-0.5
        result = x if hidden else self._logits(x)
        if after is None:
            return result
        (k, v), (cross_k, cross_v) = kept
        after = dataclasses.replace(after, k=k, v=v)
        seen = jnp.broadcast_to(cross_mask[:, 0, 0], cross_k.shape[1:3])
        return result, Cache(own=after, k=cross_k, v=cross_v, real=seen)

    def _logits(self, x: jax.Array) -> jax.Array:
        logits = self.embed.attend(x) if self.config.tied else self.head(x)
        return logits.astype(jnp.float32)

    def head_of(self, params: Any) -> losses.Head:
        """Returns the head among the parameters."""
        return layers.head_of(params, self.config)

    def cache(self, batch: int, length: int, inputs: int) -> Cache:
        """Returns an empty cache for `length` targets and this many inputs."""
        config = self.config
        size = config.heads, config.head_dim
        deep = config.decoder_layers
        own = context.empty_cache(deep, batch, length, *size, config.dtype)
        zeros = jnp.zeros((deep, batch, inputs, *size), config.dtype)
        return Cache(own, zeros, zeros, jnp.zeros((batch, inputs), bool))
