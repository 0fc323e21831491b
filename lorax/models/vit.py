"""ViT and SigLIP's vision tower: patches of an image through pre-norm blocks.

A block computes

  x = x + attention(norm_attn(x)),   x = x + mlp(norm_mlp(x)).

ViT reads a [CLS] token before the patches and classifies by it; SigLIP has none, and
classifies by the mean of the patches, or pools them by attention from a learnt probe.

References:
  Dosovitskiy et al., An Image is Worth 16x16 Words, arXiv:2010.11929. Zhai et al.,
  Sigmoid Loss for Language Image Pre-Training, arXiv:2303.15343.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lorax import attention
from lorax.models import hf_config, layers, remat, vit_config

Config = vit_config.Config
entries = vit_config.entries
ALIASES = vit_config.ALIASES
FURTHER = vit_config.FURTHER
HEADS = vit_config.HEADS
IGNORED = vit_config.IGNORED
OLDER_MODULES = vit_config.OLDER_MODULES
WRITTEN = vit_config.WRITTEN

NAMES = ("input", "q", "k", "v", "attention", "o", "up", "down")
"""Names of a layer's tensors, for `remat`."""


class Block(nn.Module):
    """One layer; see `layers.run_layers` for its arguments."""

    config: Config
    deterministic: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, own: Any, shared: Any) -> tuple[jax.Array, Any]:
        """Returns the next residual stream."""
        config = self.config
        norm = functools.partial(layers.layer_norm, config=config)
        linear = functools.partial(layers.projection, config=config, use_bias=True)
        size = config.heads, config.width // config.heads
        x = remat.named(x, "input")
        h = norm("norm_attn")(x)
        q, k, v = (linear(size, n, use_bias=config.biased)(h) for n in "qkv")
        mixed = remat.named(attention.attend(q, k, v), "attention")
        x = x + self._drop(linear(config.width, "o", axis=(-2, -1))(mixed))
        h = linear(config.hidden, "up")(norm("norm_mlp")(x))
        h = hf_config.ACTIVATIONS[config.activation](h)
        return x + self._drop(linear(config.width, "down")(h)), None

    def _drop(self, x: jax.Array) -> jax.Array:
        return nn.Dropout(self.config.dropout, deterministic=self.deterministic)(x)


class Model(nn.Module):
    """Maps images to logits of their classes, to pooled states or to hidden states."""

    config: Config

    @nn.compact
    def __call__(self, images: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Reads images.

        Args:
          images: `[batch, height, width, channels]`, normalised as in training.
          deterministic: True disables dropout.

        Returns:
          Float32 logits `[batch, labels]`; or, in the compute dtype, pooled states
          `[batch, width]`, or without a head hidden states `[batch, positions, width]`.
        """
        config = self.config
        drop = nn.Dropout(config.dropout, deterministic=deterministic)
        x, _ = layers.run_layers(
            Block,
            config,
            drop(self._embedded(images)),
            None,
            None,
            length=config.layers,
            names=NAMES,
            options=(deterministic,),
        )
        x = layers.layer_norm("norm_out", config)(x)
        if config.head == "none":
            return x
        if config.head == "pooled":
            return self._pooled(x)
        x = x[:, 0] if config.family == "vit" else jnp.mean(x, axis=1)
        return self._linear(config.labels, "classifier_out")(x).astype(jnp.float32)

    def _embedded(self, images: jax.Array) -> jax.Array:
        """The patches, row by row, with their positions."""
        config = self.config
        shape = config.image, config.image, config.channels
        if images.shape[1:] != shape:
            raise ValueError(
                f"images of shape {list(images.shape[1:])}, but this model reads "
                f"{list(shape)}: resize them, as positions are learnt"
            )
        x = nn.Conv(
            config.width,
            (config.patch, config.patch),
            strides=(config.patch, config.patch),
            padding="VALID",
            kernel_init=nn.initializers.normal(0.02),
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            name="patches",
        )(images)
        x = x.reshape(x.shape[0], -1, config.width)
        if config.family == "vit":
            first = self._learnt("cls", 1)
            x = jnp.concatenate([jnp.repeat(first, x.shape[0], 0), x], axis=1)
        return x + self._learnt("positions", config.positions)

    def _pooled(self, x: jax.Array) -> jax.Array:
        """Attention from the probe to all patches, and an MLP."""
        config = self.config
        qkv = self._linear((3, config.heads, config.width // config.heads), "pool_qkv")
        q = jnp.repeat(qkv(self._learnt("probe", 1))[..., 0, :, :], x.shape[0], 0)
        k, v = (qkv(x)[..., i, :, :] for i in (1, 2))
        x = self._linear(config.width, "pool_o", (-2, -1))(attention.attend(q, k, v))
        h = self._linear(config.hidden, "pool_up")(
            layers.layer_norm("norm_pool", config)(x)
        )
        h = hf_config.ACTIVATIONS[config.activation](h)
        return (x + self._linear(config.width, "pool_down")(h))[:, 0]

    def _learnt(self, name: str, rows: int) -> jax.Array:
        """A parameter `[1, rows, width]`."""
        config = self.config
        shape = 1, rows, config.width
        draw = nn.initializers.normal(0.02)
        return self.param(name, draw, shape, config.param_dtype).astype(config.dtype)

    def _linear(self, features: Any, name: str, axis: Any = -1) -> nn.Module:
        return layers.projection(features, name, self.config, use_bias=True, axis=axis)


def example(config: Config) -> tuple[jax.Array, ...]:
    """Returns the smallest valid input."""
    return (jnp.zeros((1, config.image, config.image, config.channels)),)
