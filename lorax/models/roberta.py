"""RoBERTa and BERT: bidirectional attention, and blocks with norms after the sums.

The two differ in how they number tokens, in the number of token types, and in names on
disk. A block computes

  x = norm_attn(x + attention(x)),   x = norm_mlp(x + mlp(x)).

References:
  Devlin et al., BERT, arXiv:1810.04805. Liu et al., RoBERTa, arXiv:1907.11692.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from lorax import attention
from lorax.models import context, hf_config, layers, remat, roberta_config

Config = roberta_config.Config
entries = roberta_config.entries
ALIASES = roberta_config.ALIASES
FURTHER = roberta_config.FURTHER
HEADS = roberta_config.HEADS
IGNORED = roberta_config.IGNORED

NAMES = ("input", "q", "k", "v", "attention", "o", "up", "down")
"""Names of a layer's tensors, for `remat`."""


class EncoderSizes(layers.Sizes, Protocol):
    """What `Block` and `classify` need from a family's Config."""

    @property
    def heads(self) -> int:
        """Number of attention heads."""

    @property
    def hidden(self) -> int:
        """Width of the MLP."""

    @property
    def activation(self) -> str:
        """Activation of the MLP, by its Hugging Face name."""

    @property
    def dropout(self) -> float:
        """Dropout rate on what blocks add."""

    @property
    def labels(self) -> int:
        """Number of classes."""


class Block(nn.Module):
    """One layer; see `layers.run_layers` for its arguments."""

    config: EncoderSizes
    deterministic: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, own: Any, shared: Any) -> tuple[jax.Array, Any]:
        """Returns the next residual stream."""
        config = self.config
        linear = functools.partial(layers.projection, config=config, use_bias=True)
        x = remat.named(x, "input")
        mixed = remat.named(self._attend(x, shared), "attention")
        mixed = linear(config.width, "o", axis=(-2, -1))(mixed)
        x = layers.layer_norm("norm_attn", config)(x + self._drop(mixed))
        h = hf_config.ACTIVATIONS[config.activation](linear(config.hidden, "up")(x))
        h = linear(config.width, "down")(h)
        return layers.layer_norm("norm_mlp", config)(x + self._drop(h)), None

    def _attend(self, x: jax.Array, shared: Any) -> jax.Array:
        """What the heads return, `[batch, time, heads, head_dim]`."""
        q, k, v = (self._heads(name)(x) for name in ("q", "k", "v"))
        return attention.attend(q, k, v, mask=shared["mask"])

    def _heads(self, name: str) -> nn.Module:
        config = self.config
        size = config.heads, config.width // config.heads
        return layers.projection(size, name, config, use_bias=True)

    def _drop(self, x: jax.Array) -> jax.Array:
        return nn.Dropout(self.config.dropout, deterministic=self.deterministic)(x)


class Model(nn.Module):
    """Maps tokens to logits, of the sequence or of every token, or to hidden states."""

    config: Config

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        types: jax.Array | None = None,
        real: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Reads tokens.

        Args:
          tokens: int `[batch, time]`; the first real one is <s> or [CLS].
          positions: int `[batch, time]`, from 0; None: counted as `Config.family` says.
          types: int `[batch, time]`, token types; None: all are 0.
          real: bool `[batch, time]`, False for padding; None: all are real.
          deterministic: True disables dropout.

        Returns:
          Float32 logits, `[batch, labels]` or `[batch, time, vocabulary]`; without a
          head the hidden states `[batch, time, width]`, in the compute dtype.
        """
        config = self.config
        drop = nn.Dropout(config.dropout, deterministic=deterministic)
        embed = layers.embedding(config.vocabulary, "embed", config)
        x = embed(tokens) + self._places(tokens, positions, real)
        types = jnp.zeros_like(tokens) if types is None else types
        x = x + layers.embedding(config.types, "embed_types", config)(types)
        x, _ = layers.run_layers(
            Block,
            config,
            drop(layers.layer_norm("norm_embed", config)(x)),
            None,
            {"mask": context.padding_mask(tokens, real)},
            length=config.layers,
            names=NAMES,
            options=(deterministic,),
        )
        if config.head == "none":
            return x
        if config.head == "mlm":
            return self._predictions(x, embed)
        return classify(x, real, config, drop, jnp.tanh)

    def _places(
        self, tokens: jax.Array, positions: jax.Array | None, real: jax.Array | None
    ) -> jax.Array:
        """The embeddings of positions, `[batch, time, width]`."""
        config = self.config
        if positions is None:
            room, time = config.positions - config.offset, tokens.shape[1]
            if time > room:
                raise ValueError(f"{time} tokens, but there are {room} positions")
            counted = real if config.family == "roberta" else None
            positions = context.positions_of(tokens, counted, None)
        embed = layers.embedding(config.positions, "embed_positions", config)
        return embed(positions + config.offset)

    def _predictions(self, x: jax.Array, embed: nn.Embed) -> jax.Array:
        """The masked language model's logits."""
        config = self.config
        # RoBERTa's own code fixes this activation; BERT's uses that of the MLP
        activation = "gelu" if config.family == "roberta" else config.activation
        h = hf_config.ACTIVATIONS[activation](
            self._linear(config.width, "mlm_dense")(x)
        )
        logits = embed.attend(layers.layer_norm("mlm_norm", config)(h))
        zeros = nn.initializers.zeros
        bias = self.param("mlm_bias", zeros, (config.vocabulary,), config.param_dtype)
        return logits.astype(jnp.float32) + bias.astype(jnp.float32)

    def _linear(self, features: int, name: str) -> nn.Module:
        return layers.projection(features, name, self.config, use_bias=True)


def classify(
    x: jax.Array,
    real: jax.Array | None,
    config: EncoderSizes,
    drop: nn.Module,
    activation: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Logits `[batch, labels]` from the first real token, inside a compact method."""
    linear = functools.partial(layers.projection, config=config, use_bias=True)
    if real is None:
        first = x[:, 0]
    else:
        at = jnp.argmax(real, axis=1)
        first = jnp.take_along_axis(x, at[:, None, None], axis=1)[:, 0]
    h = activation(linear(config.width, "classifier_dense")(drop(first)))
    return linear(config.labels, "classifier_out")(drop(h)).astype(jnp.float32)
