"""Mixtures of experts in the Llama family: Mixtral and Qwen3-MoE.

Layers as Mistral's and Qwen3's, whose MLP is a router and experts, see `experts`.

| model_type | layers as | weights of a token's experts |
|---|---|---|
| mixtral | mistral | sum to one |
| qwen3_moe | qwen3 | their share among all; sum to one with norm_topk_prob |

References:
  Jiang et al., Mixtral of Experts, arXiv:2401.04088. Qwen3, arXiv:2505.09388.
"""

from __future__ import annotations

from typing import Any

import jax

from lorax.models import decoder_config, experts, layers, llama, mixture_config

Config = mixture_config.Config
entries = mixture_config.entries
fused = mixture_config.fused
FURTHER = (fused,)
"""Tables by which parameters may lie on disk, too."""

ALIASES = decoder_config.ALIASES
IGNORED = decoder_config.IGNORED

NAMES = (*llama.ATTENTION, *experts.NAMES)
"""Of a layer's tensors, for `remat`."""


class Block(llama.Block):
    """One layer; see `layers.run_layers` for its arguments."""

    config: Config

    def _mlp(self, x: jax.Array, shared: Any) -> jax.Array:
        del shared
        config = self.config
        logits = layers.projection(config.experts, "router", config)(x)
        experts.record(self, logits)
        routes = experts.route(logits, config.chosen, config.renormalised)
        return experts.Experts(config, name="experts")(x, routes)


class Model(llama.Model):
    """Tokens to logits of the next token; see `llama.Model`."""

    config: Config
    block = Block
    names = NAMES
