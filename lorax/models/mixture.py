"""Mixtures of experts in the Llama family: Mixtral, Qwen3-MoE and GPT-OSS.

Layers as in the Llama family, with a router and experts as the MLP; see `experts`.

| model_type | layers as | weights of a token's experts |
|---|---|---|
| mixtral | mistral | sum to one |
| qwen3_moe | qwen3 | their share among all; sum to one with norm_topk_prob |
| gpt_oss | llama with biases, sinks, a window in every second layer | sum to one |

References:
  Jiang et al., Mixtral of Experts, arXiv:2401.04088. Qwen3, arXiv:2505.09388.
  gpt-oss-120b & gpt-oss-20b Model Card, arXiv:2508.10925.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lorax import attention
from lorax.models import decoder_config, experts, layers, llama, mixture_config

Config = mixture_config.Config
entries = mixture_config.entries
fused = mixture_config.fused
FURTHER = (fused,)
"""Other tables that a checkpoint may follow."""

ALIASES = decoder_config.ALIASES
IGNORED = decoder_config.IGNORED

NAMES = (*llama.ATTENTION, *experts.NAMES)
"""Names of a layer's tensors, for `remat`."""


class Block(llama.Block):
    """One layer; see `layers.run_layers` for its arguments."""

    config: Config

    def _mlp(self, x: jax.Array, shared: Any) -> jax.Array:
        del shared
        config = self.config
        bias = config.expert_bias
        router = layers.projection(config.experts, "router", config, use_bias=bias)
        logits = router(x)
        experts.record(self, logits)
        routes = experts.route(logits, config.chosen, config.renormalised)
        return experts.Experts(config, name="experts")(x, routes)

    def _attend(
        self, q: Any, k: Any, v: Any, kept: Any, window: Any, shared: Any
    ) -> jax.Array:
        config = self.config
        if not config.sinks:
            return super()._attend(q, k, v, kept, window, shared)
        draw = nn.initializers.normal(0.02)
        sinks = self.param("sinks", draw, (config.heads,), config.param_dtype)
        mask = shared["mask"]
        if window is not None:
            mask = mask & ((shared["back"] < window) | (window == 0))
        return _beside_sinks(q, k, v, mask, sinks)


def _beside_sinks(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, sinks: jax.Array
) -> jax.Array:
    """Attention with one more key, of score `sinks` and value 0, that all tokens see.

    Queries and keys get one more feature: the head's sink in queries, 1 in this key and
    0 in the others.
    """
    scale = q.shape[-1] ** -0.5
    own = (sinks / scale).astype(q.dtype)[:, None]
    q = jnp.concatenate([q, jnp.broadcast_to(own, (*q.shape[:-1], 1))], -1)
    k, v = (jnp.pad(x, [(0, 0), (0, 1), (0, 0), (0, 1)]) for x in (k, v))
    k = k.at[:, -1, :, -1].set(1)
    mask = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, 1)], constant_values=True)
    return attention.attend(q, k, v, mask=mask, scale=scale)[..., :-1]


class Model(llama.Model):
    """Maps tokens to logits of the next token; see `llama.Model`."""

    config: Config
    block = Block
    names = NAMES
