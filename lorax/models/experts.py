"""Mixtures of experts: a router, and gated MLPs of which a token visits a few.

    l = x Wr [+ br],   chosen = the k experts of the largest l,   y = sum_e w_e f_e(x)

    w = softmax of the chosen l            (Mixtral, Qwen3 with norm_topk_prob, GPT-OSS)
    w = those of softmax(l) over all       (Qwen3 without)

The first is the second divided by its sum. All experts of a layer are one leaf:
`experts/gate_up/kernel` `[experts, in, 2, hidden]`, gates first, and
`experts/down/kernel` `[experts, hidden, out]`.

`dispatch` says how tokens meet experts; all give the same result, and drop no token:

| dispatch | what is computed |
|---|---|
| "ragged" | each token by its experts: rows sorted by expert, `jax.lax.ragged_dot` |
| "dense" | each token by every expert; the definition, and a check |

References:
  Shazeer et al., Outrageously Large Neural Networks, arXiv:1701.06538.
  Fedus et al., Switch Transformers, arXiv:2101.03961. Jiang et al., Mixtral of Experts,
  arXiv:2401.04088.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from lorax.models import hf_config, layers, remat

DISPATCHES = ("ragged", "dense")

NAMES = ("router", "gate_up", "down")
"""Of a layer's tensors, for `remat`."""


class Sizes(layers.Sizes, Protocol):
    """What the modules below read of a family's Config."""

    @property
    def hidden(self) -> int:
        """Width of an expert."""

    @property
    def experts(self) -> int:
        """How many there are."""

    @property
    def chosen(self) -> int:
        """How many a token visits."""

    @property
    def renormalised(self) -> bool:
        """The weights of a token's experts sum to one."""

    @property
    def activation(self) -> str:
        """Of the gate, by its Hugging Face name."""

    @property
    def dispatch(self) -> str:
        """One of DISPATCHES."""


class Routes(NamedTuple):
    """Where tokens go.

    Attributes:
      experts: int32 `[..., chosen]`.
      weights: float32 `[..., chosen]`.
    """

    experts: jax.Array
    weights: jax.Array


def route(logits: jax.Array, chosen: int, renormalised: bool) -> Routes:
    """Returns the experts of each token, the best first.

    Args:
      logits: `[..., experts]`.
      chosen: experts of a token.
      renormalised: their weights sum to one.

    Example:
      >>> routes = route(jnp.log(jnp.array([0.1, 0.6, 0.3])), 2, renormalised=False)
      >>> routes.experts.tolist(), routes.weights.round(2).tolist()
      ([1, 2], [0.6000000238418579, 0.30000001192092896])
    """
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    best, experts = jax.lax.top_k(wide, chosen)
    if renormalised:
        return Routes(experts, jax.nn.softmax(best))
    return Routes(experts, jnp.exp(best - jax.nn.logsumexp(wide, -1, keepdims=True)))


class Experts(nn.Module):
    """The gated MLPs of one layer, on the tokens that go to them."""

    config: Sizes

    @nn.compact
    def __call__(self, x: jax.Array, routes: Routes) -> jax.Array:
        """Maps `[batch, time, width]` to the weighted sums of the experts' results."""
        config = self.config
        shape = config.experts, config.width, 2, config.hidden
        gate_up = Stack(shape, config, name="gate_up")()
        down = Stack((shape[0], shape[3], shape[1]), config, name="down")()
        run = {"dense": dense, "ragged": ragged}[config.dispatch]
        activation = hf_config.ACTIVATIONS[config.activation]
        tokens = x.reshape(-1, config.width)
        flat = Routes(*(part.reshape(-1, config.chosen) for part in routes))
        return run(tokens, flat, gate_up, down, activation).reshape(x.shape)


class Stack(nn.Module):
    """A kernel `[experts, in, *out]`, drawn from N(0, 0.02^2)."""

    shape: tuple[int, ...]
    config: Sizes

    @nn.compact
    def __call__(self) -> jax.Array:
        """Returns the kernel in the dtype of the computation."""
        draw = nn.initializers.normal(0.02)
        kernel = self.param("kernel", draw, self.shape, self.config.param_dtype)
        return kernel.astype(self.config.dtype)


Activation = Callable[[jax.Array], jax.Array]


def dense(
    x: jax.Array, routes: Routes, gate_up: Any, down: Any, activation: Activation
) -> jax.Array:
    """Every expert on every token; those that were not chosen have the weight zero.

    Args:
      x: `[tokens, in]`.
      routes: of the tokens.
      gate_up: `[experts, in, 2, hidden]`.
      down: `[experts, hidden, out]`.
      activation: of the gates.

    Returns:
      `[tokens, out]`.
    """
    count = gate_up.shape[0]
    of = jax.nn.one_hot(routes.experts, count, dtype=routes.weights.dtype)
    weights = jnp.einsum("tk,tke->et", routes.weights, of)
    each = jnp.broadcast_to(x, (count, *x.shape))  # so that experts are a batch
    both = remat.named(jnp.einsum("etd,edgf->etgf", each, gate_up), "gate_up")
    h = activation(both[:, :, 0]) * both[:, :, 1]
    y = remat.named(jnp.einsum("etf,efd->etd", h, down), "down")
    return jnp.einsum("etd,et->td", y, weights.astype(y.dtype))


def ragged(
    x: jax.Array, routes: Routes, gate_up: Any, down: Any, activation: Activation
) -> jax.Array:
    """As `dense`: the rows of an expert lie together, and meet its kernels alone."""
    count, tokens, chosen = gate_up.shape[0], *routes.experts.shape
    own = routes.experts.reshape(-1)
    order = jnp.argsort(own)
    sizes = jnp.bincount(own, length=count).astype(jnp.int32)
    rows = x[order // chosen]
    wide = gate_up.reshape(*gate_up.shape[:2], -1)
    both = remat.named(jax.lax.ragged_dot(rows, wide, sizes), "gate_up")
    gate, up = jnp.split(both, 2, axis=-1)
    y = jax.lax.ragged_dot(activation(gate) * up, down, sizes)
    y = remat.named(y, "down")[jnp.argsort(order)].reshape(tokens, chosen, -1)
    return jnp.einsum("tkd,tk->td", y, routes.weights.astype(y.dtype))
