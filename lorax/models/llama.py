"""The Llama family: decoders whose layers differ from Llama's by a few switches.

Pre-norm blocks with RMS norms, rotary positions, grouped queries and a gated MLP.

| model_type | what differs from Llama |
|---|---|
| mistral, ministral | a sliding window in every layer, or in some |
| olmo2 | norms after attention and MLP; RMS norms on q and k, over all heads |
| phi3 | q, k and v in one kernel, gate and up in another; longrope; partial rotation |
| qwen2 | biases on q, k and v; a window in some layers, if it is switched on |
| qwen3 | no such biases; RMS norms on q and k, over each head |
| smollm3 | some layers do not rotate q and k |

References:
  Touvron et al., Llama 2, arXiv:2307.09288. Jiang et al., Mistral 7B, arXiv:2310.06825.
  Qwen2.5, arXiv:2412.15115. Qwen3, arXiv:2505.09388. OLMo 2, arXiv:2501.00656. Phi-3,
  arXiv:2404.14219. Phi-4-mini, arXiv:2503.01743. SmolLM3,
  https://huggingface.co/blog/smollm3.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from lorax import losses
from lorax.models import (
    context,
    decoder_config,
    hf_config,
    layers,
    llama_config,
    remat,
    rope,
)

Config = llama_config.Config
entries = llama_config.entries
ALIASES = decoder_config.ALIASES
IGNORED = decoder_config.IGNORED

ATTENTION = ("input", "q", "k", "v", "attention", "o")
NAMES = (*ATTENTION, "gate", "up", "down")
"""Names of a layer's tensors, for `remat`."""


class Block(nn.Module):
    """One layer; see `layers.run_layers` for its arguments."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, own: Any, shared: Any) -> tuple[jax.Array, Any]:
        """Returns the next residual stream and the layer's cache."""
        x = remat.named(x, "input")
        mixed, kept = self._attention(self._before("norm_attn", x), own, shared)
        x = x + self._behind("norm_attn", mixed)
        h = self._mlp(self._before("norm_mlp", x), shared)
        return x + self._behind("norm_mlp", h), kept

    def _mlp(self, x: jax.Array, shared: Any) -> jax.Array:
        """What a layer adds after attention; `mixture` overrides it."""
        del shared
        config = self.config
        if config.fused:
            both = self._linear((2, config.hidden), "gate_up", config.mlp_bias)(x)
            gate, up = both[..., 0, :], both[..., 1, :]
            gate, up = remat.named(gate, "gate"), remat.named(up, "up")
        else:
            gate = self._linear(config.hidden, "gate", config.mlp_bias)(x)
            up = self._linear(config.hidden, "up", config.mlp_bias)(x)
        h = hf_config.ACTIVATIONS[config.activation](gate) * up
        return self._linear(config.width, "down", config.mlp_bias)(h)

    def _attention(self, x: jax.Array, own: Any, shared: Any) -> tuple[jax.Array, Any]:
        config = self.config
        q, k, v = self._qkv(x)
        if config.qk_norm:
            q, k = self._normed("norm_q", q), self._normed("norm_k", k)
        angles = shared["angles"]
        if config.turned:
            cos, sin = angles
            angles = jnp.where(own["turned"], cos, 1), jnp.where(own["turned"], sin, 0)
        q, k = rope.rotate(q, angles), rope.rotate(k, angles)
        k, v, kept = layers.remember(k, v, own["cache"], shared["slot"])
        mixed = self._attend(q, k, v, kept, own["window"], shared)
        mixed = remat.named(mixed, "attention")
        return self._linear(config.width, "o", config.o_bias, (-2, -1))(mixed), kept

    def _qkv(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        config, bias = self.config, self.config.qkv_bias
        heads = {"q": config.heads, "k": config.kv_heads, "v": config.kv_heads}
        if not config.fused:
            q, k, v = (
                self._linear((n, config.head_dim), name, bias)(x)
                for name, n in heads.items()
            )
            return q, k, v
        ends = config.heads, config.heads + config.kv_heads
        rows = sum(heads.values()), config.head_dim
        parts = jnp.split(self._linear(rows, "qkv", bias)(x), ends, axis=-2)
        q, k, v = map(remat.named, parts, heads)
        return q, k, v

    def _attend(
        self, q: Any, k: Any, v: Any, kept: Any, window: Any, shared: Any
    ) -> jax.Array:
        """What the heads return; `mixture` adds sinks to the keys."""
        return layers.attend(q, k, v, kept, window, shared, self.config)

    def _linear(
        self, features: Any, name: str, bias: bool, axis: Any = -1
    ) -> nn.Module:
        return layers.projection(features, name, self.config, use_bias=bias, axis=axis)

    def _normed(self, name: str, x: jax.Array) -> jax.Array:
        flat = x.reshape(*x.shape[:-2], -1) if self.config.all_heads else x
        return self._norm(name)(flat).reshape(x.shape)

    def _before(self, name: str, x: jax.Array) -> jax.Array:
        return x if self.config.post_norms else self._norm(name)(x)

    def _behind(self, name: str, x: jax.Array) -> jax.Array:
        return self._norm(name)(x) if self.config.post_norms else x

    def _norm(self, name: str) -> nn.RMSNorm:
        return layers.rms_norm(name, self.config)


class Model(nn.Module):
    """Maps tokens to logits of the next token."""

    config: Config
    block: ClassVar[type[nn.Module]] = Block
    names: ClassVar[tuple[str, ...]] = NAMES

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
          deterministic: accepted as in other families; there is no dropout.
          last_only: return only the last token's logits, `[batch, 1, vocabulary]`.
          hidden: return what the head reads, `[batch, time, width]`, not logits.

        Returns:
          Logits `[batch, time, vocabulary]`, float32; with a cache, also the new cache.
        """
        del deterministic
        config = self.config
        rows = context.rows(
            tokens,
            config,
            positions=positions,
            real=real,
            segments=segments,
            cache=cache,
        )
        embed = layers.embedding(config.vocabulary, "embed", config)
        own = {
            "cache": rows.seen.kept,
            "window": layers.windows(config),
            "turned": jnp.array(config.turned) if config.turned else None,
        }
        slots = None if cache is None else cache.length
        angles = config.rope.angles(rows.positions, config.head_dim, slots)
        shared = {"angles": angles, **rows.shared}
        x, kept = layers.run_layers(
            self.block,
            config,
            embed(rows.tokens),
            own,
            shared,
            length=config.layers,
            names=self.names,
        )
        x = layers.rms_norm("norm_out", config)(rows.result(x, last_only))
        return rows.seen.result(x if hidden else layers.head(x, embed, config), kept)

    def head_of(self, params: Any) -> losses.Head:
        """Returns the head among the parameters."""
        return layers.head_of(params, self.config)

    def cache(self, batch: int, length: int) -> context.Cache:
        """Returns an empty cache of `length` slots."""
        c = self.config
        return context.empty_cache(
            c.layers, batch, length, c.kv_heads, c.head_dim, c.dtype
        )
