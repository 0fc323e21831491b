"""Gemma 1 and 2, and the text models of Gemma 3.

Blocks with RMS norms before and (from Gemma 2 on) after attention and MLP, rotary
positions, grouped queries and a gated MLP; layers with a window alternate with layers
that see all. A norm scales by one plus its scale; the embedding is multiplied by the
square root of the width.

| model_type | layers that see all | rotation | what else differs |
|---|---|---|---|
| gemma | all | one | no norms after attention and MLP |
| gemma2 | every second | one | soft caps on scores and logits |
| gemma3_text | every sixth | one for each kind of layer | RMS norms on q and k |

References:
  Gemma, arXiv:2403.08295. Gemma 2, arXiv:2408.00118. Gemma 3, arXiv:2503.19786.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lorax import losses
from lorax.models import (
    context,
    decoder_config,
    gemma_config,
    hf_config,
    layers,
    remat,
    rope,
)

Config = gemma_config.Config
entries = gemma_config.entries
ALIASES = decoder_config.ALIASES
IGNORED = decoder_config.IGNORED

NAMES = ("input", "q", "k", "v", "attention", "o", "gate", "up", "down")
"""Names of a layer's tensors, for `remat`."""


class Norm(nn.Module):
    """An RMS norm that scales by `1 + scale`, in float32."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., size]` to the same."""
        kind = self.config.param_dtype
        scale = self.param("scale", nn.initializers.zeros, x.shape[-1:], kind)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        power = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(power + self.config.eps)
        return (normed * (1 + scale.astype(wide.dtype))).astype(self.config.dtype)


class Block(nn.Module):
    """One layer; see `layers.run_layers` for its arguments."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, own: Any, shared: Any) -> tuple[jax.Array, Any]:
        """Returns the next residual stream and the layer's cache."""
        config = self.config
        x = remat.named(x, "input")
        mixed, kept = self._attention(self._norm("norm_attn")(x), own, shared)
        x = x + self._post("norm_attn_out", mixed)
        h = self._norm("norm_mlp")(x)
        gate = layers.projection(config.hidden, "gate", config)(h)
        up = layers.projection(config.hidden, "up", config)(h)
        h = hf_config.ACTIVATIONS[config.activation](gate) * up
        h = layers.projection(config.width, "down", config)(h)
        return x + self._post("norm_mlp_out", h), kept

    def _attention(self, x: jax.Array, own: Any, shared: Any) -> tuple[jax.Array, Any]:
        config = self.config
        bias = config.qkv_bias
        q, k, v = (
            layers.projection((heads, config.head_dim), name, config, use_bias=bias)(x)
            for name, heads in zip(
                "qkv", (config.heads, config.kv_heads, config.kv_heads), strict=True
            )
        )
        if config.qk_norm:
            q, k = self._norm("norm_q")(q), self._norm("norm_k")(k)
        local = own["window"] > 0
        angles = jax.tree.map(
            lambda near, far: jnp.where(local, near, far), *shared["angles"]
        )
        q, k = rope.rotate(q, angles), rope.rotate(k, angles)
        k, v, kept = layers.remember(k, v, own["cache"], shared["slot"])
        mixed = layers.attend(
            q,
            k,
            v,
            kept,
            own["window"],
            shared,
            config,
            scale=config.query_scale**-0.5,
            soft_cap=config.soft_cap,
        )
        mixed = remat.named(mixed, "attention")
        out = layers.projection(config.width, "o", config, use_bias=bias, axis=(-2, -1))
        return out(mixed), kept

    def _post(self, name: str, x: jax.Array) -> jax.Array:
        return self._norm(name)(x) if self.config.post_norms else x

    def _norm(self, name: str) -> Norm:
        return Norm(self.config, name=name)


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
        """Reads tokens; arguments and result are those of `llama.Model`."""
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
        # rounded, as in the original code
        root = jnp.asarray(config.width**0.5, config.param_dtype)
        own = {"cache": rows.seen.kept, "window": layers.windows(config)}
        ropes = config.local_rope, config.rope
        angles = tuple(r.angles(rows.positions, config.head_dim) for r in ropes)
        x, kept = layers.run_layers(
            Block,
            config,
            embed(rows.tokens) * root.astype(config.dtype),
            own,
            {"angles": angles, **rows.shared},
            length=config.layers,
            names=NAMES,
        )
        x = Norm(config, name="norm_out")(rows.result(x, last_only))
        if hidden:
            return rows.seen.result(x, kept)
        logits = layers.capped(layers.head(x, embed, config), config.logit_cap)
        return rows.seen.result(logits, kept)

    def head_of(self, params: Any) -> losses.Head:
        """Returns the head among the parameters."""
        cap = self.config.logit_cap
        return layers.head_of(params, self.config)._replace(soft_cap=cap)

    def cache(self, batch: int, length: int) -> context.Cache:
        """Returns an empty cache of `length` slots."""
        c = self.config
        return context.empty_cache(
            c.layers, batch, length, c.kv_heads, c.head_dim, c.dtype
        )
