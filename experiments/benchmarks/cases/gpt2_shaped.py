"""A GPT-2-shaped Flax model that is efficient on a CPU, with `scan` and `remat`.

Two choices matter on XLA:CPU, by 3 to 5 % of a step each: layer norm centres the
activation before squaring it, and GELU is the tanh form that GPT-2 itself uses. The
layout of attention, the mask and the softmax made no measurable difference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

LINEARS = ("q", "k", "v", "o", "up", "down")

Dense = Callable[..., nn.Module]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the model and of a batch."""

    layers: int = 6
    width: int = 512
    heads: int = 8
    vocabulary: int = 256
    batch: int = 8
    time: int = 128
    rank: int = 8
    alpha: float = 16.0

    @property
    def hidden(self) -> int:
        """Width of the MLP."""
        return 4 * self.width

    @property
    def scale(self) -> float:
        """The factor of the low-rank product."""
        return self.alpha / self.rank


def layer_norm(name: str) -> nn.LayerNorm:
    """GPT-2's layer norm."""
    return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name=name)


class Block(nn.Module):
    """One pre-norm layer, in the carry-and-output form that `nn.scan` needs."""

    shape: Shape
    dense: Dense

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """Maps `[batch, time, width]` to the same."""
        width, heads = self.shape.width, self.shape.heads
        split = (*x.shape[:-1], heads, width // heads)

        h = layer_norm("ln_1")(x)
        q, k, v = (self.dense(width, name=name)(h).reshape(split) for name in "qkv")
        scores = jnp.einsum("bqhd,bkhd->bhqk", q * split[-1] ** -0.5, k)
        causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e30))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        x = x + self.dense(width, name="o")(mixed)

        h = self.dense(self.shape.hidden, name="up")(layer_norm("ln_2")(x))
        h = jax.nn.gelu(h, approximate=True)
        return x + self.dense(width, name="down")(h), None


class Gpt2(nn.Module):
    """Tokens to logits of the next token.

    Attributes:
      shape: sizes.
      dense: the linear layer of the blocks, called as `dense(features, name=...)`.
      scan: stacks the layers on axis 0 of every leaf under `h/`, and loops over them.
      remat: recomputes each layer in the backward pass.
      unroll: layers per iteration of the loop; it changes the program, not its value.
    """

    shape: Shape
    dense: Dense = nn.Dense
    scan: bool = False
    remat: bool = False
    unroll: int = 1

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps `[batch, time]` to `[batch, time, vocabulary]`."""
        shape = self.shape
        x = nn.Embed(shape.vocabulary, shape.width, name="wte")(tokens)
        x = x + nn.Embed(shape.time, shape.width, name="wpe")(jnp.arange(shape.time))
        block: Any = nn.remat(Block) if self.remat else Block
        if self.scan:
            layers = nn.scan(
                block,
                variable_axes={"params": 0, "lora": 0},
                split_rngs={"params": True},
                length=shape.layers,
                unroll=self.unroll,
            )
            x, _ = layers(shape, self.dense, name="h")(x, None)
        else:
            for i in range(shape.layers):
                x, _ = block(shape, self.dense, name=f"h_{i}")(x, None)
        return nn.Dense(shape.vocabulary, use_bias=False, name="head")(
            layer_norm("ln_f")(x)
        )


def cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns the mean loss of predicting `tokens[:, 1:]`; tokens `[batch, time + 1]`.

    It is computed in float32 or wider.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean()


def tokens(shape: Shape, seed: int = 0) -> jax.Array:
    """Draws a batch `[batch, time + 1]`."""
    size = (shape.batch, shape.time + 1)
    return jax.random.randint(jax.random.key(seed), size, 0, shape.vocabulary)
