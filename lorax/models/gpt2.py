"""GPT-2: learned positions, pre-norm blocks, one fused kernel for q, k and v.

The fused kernel is a leaf `[width, 3, heads, head_dim]`, so an adapter on it is one
adapter, as in the published runs; slices of axis 1 are q, k and v.

References:
  Radford et al., Language Models are Unsupervised Multitask Learners, 2019.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lorax import attention, losses
from lorax.models import context, hf_config, layers, remat, table


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and switches.

    Attributes:
      vocabulary: number of tokens.
      positions: longest sequence; there is no embedding for later tokens.
      width: of the residual stream.
      layers: number of blocks.
      heads: number of attention heads; it divides the width.
      hidden: width of the MLP.
      activation: of the MLP, by its Hugging Face name.
      eps: of the layer norms.
      scale: scores are multiplied by `head_dim ** -0.5`.
      scale_by_layer: scores are divided by the layer's number, from 1.
      tied: the head is the embedding; else `head/kernel`.
      dropout: in training, rate on embeddings and on what blocks add; attention
        weights have none.
      scan: layers are stacked on axis 0.
      remat: see `lorax.models.remat`.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    vocabulary: int = 50257
    positions: int = 1024
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    activation: str = "gelu_new"
    eps: float = 1e-5
    scale: bool = True
    scale_by_layer: bool = False
    tied: bool = True
    dropout: float = 0.0
    scan: bool = True
    remat: str = "none"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        hf_config.require_divisor(heads=self.heads, width=self.width)

    @property
    def stacks(self) -> dict[str, int]:
        """Number of layers in every stack."""
        return {"layers": self.layers}

    @property
    def limit(self) -> int:
        """Longest sequence."""
        return self.positions

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **switches: Any) -> Config:
        """Reads a config.json; `switches` set dropout, scan, dtype, ..."""
        fields = hf_config.Fields(config, "gpt2")
        width, heads = fields.integer("n_embd", 768), fields.integer("n_head", 12)
        fields.divides(n_head=heads, n_embd=width)
        fields.expect(reorder_and_upcast_attn=False, summary_type="cls_index")
        own = cls(
            vocabulary=fields.integer("vocab_size", 50257),
            positions=fields.integer("n_positions", 1024),
            width=width,
            layers=fields.layers("n_layer", 12),
            heads=heads,
            hidden=fields.integer("n_inner", 4 * width),
            activation=fields.activation("activation_function", "gelu_new"),
            eps=fields.epsilon("layer_norm_epsilon", 1e-5),
            scale=fields.flag("scale_attn_weights", True),
            scale_by_layer=fields.flag("scale_attn_by_inverse_layer_idx", False),
            tied=fields.flag("tie_word_embeddings", True),
            **switches,
        )
        summary = "activation first_dropout proj_to_labels use_proj"
        fields.finish(*(f"summary_{name}" for name in summary.split()))
        return own

    def to_hf(self) -> dict[str, Any]:
        """Returns the fields of a config.json."""
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": self.vocabulary,
            "n_positions": self.positions,
            "n_embd": self.width,
            "n_layer": self.layers,
            "n_head": self.heads,
            "n_inner": self.hidden,
            "activation_function": self.activation,
            "layer_norm_epsilon": self.eps,
            "scale_attn_weights": self.scale,
            "scale_attn_by_inverse_layer_idx": self.scale_by_layer,
            "tie_word_embeddings": self.tied,
        }


NAMES = ("input", "qkv", "attention", "o", "up", "down")
"""Names of a layer's tensors, for `remat`."""


class Block(nn.Module):
    """One layer; see `layers.run_layers` for its arguments."""

    config: Config
    deterministic: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, own: Any, shared: Any) -> tuple[jax.Array, Any]:
        """Returns the next residual stream and the layer's cache."""
        x = remat.named(x, "input")
        mixed, kept = self._attention(self._norm("norm_attn")(x), own, shared)
        x = x + self._drop(mixed)
        h = self._linear(self.config.hidden, "up")(self._norm("norm_mlp")(x))
        h = hf_config.ACTIVATIONS[self.config.activation](h)
        return x + self._drop(self._linear(self.config.width, "down")(h)), kept

    def _attention(self, x: jax.Array, own: Any, shared: Any) -> tuple[jax.Array, Any]:
        config = self.config
        size = config.width // config.heads
        qkv = self._linear((3, config.heads, size), "qkv")(x)
        q, k, v = (qkv[..., i, :, :] for i in range(3))
        k, v, kept = layers.remember(k, v, own["cache"], shared["slot"])
        scale = size**-0.5 if config.scale else 1.0
        if config.scale_by_layer:  # the scale is static; the layer's number is traced
            q = q / own["number"].astype(q.dtype)
        mixed = attention.attend(q, k, v, mask=shared["mask"], scale=scale)
        mixed = remat.named(mixed, "attention")
        return self._linear(config.width, "o", axis=(-2, -1))(mixed), kept

    def _linear(self, features: Any, name: str, axis: Any = -1) -> nn.Module:
        return layers.projection(features, name, self.config, use_bias=True, axis=axis)

    def _norm(self, name: str) -> nn.LayerNorm:
        return layers.layer_norm(name, self.config)

    def _drop(self, x: jax.Array) -> jax.Array:
        return nn.Dropout(self.config.dropout, deterministic=self.deterministic)(x)


class Model(nn.Module):
    """Maps tokens to logits of the next token."""

    config: Config

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        real: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: context.Cache | None = None,
        deterministic: bool = True,
        last_only: bool = False,
        hidden: bool = False,
    ) -> Any:
        """Reads tokens.

        Args:
          tokens: int `[batch, time]`.
          positions: int `[batch, time]`; None counts the real tokens.
          real: bool `[batch, time]`, False for padding; None: all are real.
          segments: int `[batch, time]`, of packed documents.
          cache: from `cache`: what was read before.
          deterministic: True disables dropout.
          last_only: return only the last token's logits, `[batch, 1, vocabulary]`.
          hidden: return what the head reads, `[batch, time, width]`, not logits.

        Returns:
          Logits `[batch, time, vocabulary]`, float32; with a cache, also the new cache.
        """
        config = self.config
        seen = context.of(
            tokens, positions=positions, real=real, segments=segments, cache=cache
        )
        embed = layers.embedding(config.vocabulary, "embed", config)
        places = layers.embedding(config.positions, "embed_positions", config)
        x = embed(tokens) + places(seen.positions)
        x, kept = layers.run_layers(
            Block,
            config,
            nn.Dropout(config.dropout, deterministic=deterministic)(x),
            {"cache": seen.kept, "number": jnp.arange(1, config.layers + 1)},
            {"mask": seen.mask, "slot": seen.slot},
            length=config.layers,
            names=NAMES,
            options=(deterministic,),
        )
        x = layers.layer_norm("norm_out", config)(x[:, -1:] if last_only else x)
        return seen.result(x if hidden else layers.head(x, embed, config), kept)

    def head_of(self, params: Any) -> losses.Head:
        """Returns the head among the parameters."""
        return layers.head_of(params, self.config)

    def cache(self, batch: int, length: int) -> context.Cache:
        """Returns an empty cache of `length` slots."""
        config = self.config
        size = config.width // config.heads
        return context.empty_cache(
            config.layers, batch, length, config.heads, size, config.dtype
        )


ALIASES = ((r"(wte|wpe|h|ln_f)\.", r"transformer.\1."),)
"""Older names on disk, as `(regex of a prefix, replacement)`."""

IGNORED = (r".*\.attn\.(bias|masked_bias)",)
"""Buffers of older checkpoints, which hold nothing learnt."""


def entries(config: Config) -> tuple[table.Entry, ...]:
    """Returns the table of parameters."""
    heads, width, hidden = ("heads", "head_dim"), ("embed",), ("mlp",)
    conv = functools.partial(table.linear, bias=True, transposed=False)
    block = [
        *table.layer_norm("ln_1", "norm_attn"),
        *conv("attn.c_attn", "qkv", width, (None, *heads)),
        *conv("attn.c_proj", "o", heads, width),
        *table.layer_norm("ln_2", "norm_mlp"),
        *conv("mlp.c_fc", "up", width, hidden),
        *conv("mlp.c_proj", "down", hidden, width),
    ]
    whole = [
        table.embedding("transformer.wte", "embed"),
        table.embedding("transformer.wpe", "embed_positions", rows=None),
        *table.inside("transformer.h.{}", "layers{}", block),
        *table.layer_norm("transformer.ln_f", "norm_out"),
    ]
    if not config.tied:
        whole += table.linear("lm_head", "head", width, ("vocab",))
    return tuple(whole)
