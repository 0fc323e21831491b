"""A small byte-level decoder, scanned over its layers and efficient on a CPU.

Pre-norm blocks of causal attention with rotary positions and a squared-ReLU MLP. The
residual stream is `[batch * time, width]` throughout: XLA:CPU multiplies
two-dimensional operands at full speed, but gradients that contract two leading axes
take several times as long. Only attention's inner products see four axes.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Attention(nn.Module):
    """Causal self-attention over rows of `[batch * time, width]`."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, batch: int) -> jax.Array:
        """Mixes the rows of each of the `batch` sequences."""
        width = x.shape[-1]
        split = (batch, -1, self.heads, width // self.heads)
        q, k, v = (  # [batch, time, heads, head_dim]
            nn.Dense(width, use_bias=False, name=name)(x).reshape(split)
            for name in ("q", "k", "v")
        )
        q, k = rotate(q), rotate(k)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * split[-1] ** -0.5
        causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        weights = nn.softmax(jnp.where(causal, scores, jnp.finfo(scores.dtype).min))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        return nn.Dense(width, use_bias=False, name="o")(mixed)


class Mlp(nn.Module):
    """Two linear maps around a squared ReLU."""

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps each row separately."""
        h = nn.Dense(self.hidden, use_bias=False, name="up")(x)
        # Squared ReLU (Primer, 2109.08668): as good as GELU, without transcendentals.
        return nn.Dense(x.shape[-1], use_bias=False, name="down")(
            jnp.square(nn.relu(h))
        )


class Block(nn.Module):
    """One layer, in the carry-and-output form that `nn.scan` needs."""

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array, batch: int) -> tuple[jax.Array, None]:
        """Returns the next residual stream, and no output to stack."""
        x += Attention(self.heads, name="attn")(nn.RMSNorm(name="norm_attn")(x), batch)
        x += Mlp(self.hidden, name="mlp")(nn.RMSNorm(name="norm_mlp")(x))
        return x, None


class Decoder(nn.Module):
    """Bytes to logits of the next byte.

    Attributes:
      vocabulary: number of tokens.
      layers: blocks, stacked on axis 0 of every leaf under `layers/`.
      width: size of the residual stream.
      heads: attention heads; `width / heads` is the head's size and must be even.
      hidden: width of the MLP.
      prefix: learned positions before every sequence, `prefix: [prefix, width]`, that
        give no logits (the LoRA paper's prefix-embedding tuning); see `with_prefix`.
    """

    vocabulary: int
    layers: int
    width: int
    heads: int
    hidden: int
    prefix: int = 0

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps int `[batch, time]` to logits `[batch, time, vocabulary]`."""
        batch, time = tokens.shape
        embed = nn.Embed(self.vocabulary, self.width, name="embed")
        x = embed(tokens.reshape(-1))  # [batch * time, width]
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.layers,
        )(self.heads, self.hidden, name="layers")
        if self.prefix:
            shape = self.prefix, self.width
            own = self.param("prefix", nn.initializers.normal(self.width**-0.5), shape)
            own = jnp.broadcast_to(own.astype(x.dtype), (batch, *shape))
            x = jnp.concatenate([own, x.reshape(batch, time, -1)], axis=1)
            x = x.reshape(-1, self.width)
        x, _ = blocks(x, batch)
        if self.prefix:
            x = x.reshape(batch, -1, self.width)[:, self.prefix :]
            x = x.reshape(-1, self.width)
        x = nn.RMSNorm(name="norm_out")(x)
        logits = nn.Dense(self.vocabulary, use_bias=False, name="head")(x)
        return logits.reshape(batch, time, self.vocabulary)


def with_prefix(
    model: Decoder, params: Any, tokens: jax.typing.ArrayLike
) -> tuple[Decoder, dict[str, Any]]:
    """Returns the model with a learned prefix, and its parameters.

    The prefix begins as the embeddings of real tokens, which train more stably than
    random ones (Li and Liang, Prefix-Tuning, arXiv:2101.00190).

    Args:
      model: without a prefix.
      params: its parameters.
      tokens: int `[prefix]`.
    """
    rows = params["embed"]["embedding"][jnp.asarray(tokens)]
    return model.clone(prefix=len(rows)), {**params, "prefix": rows}


def rotate(x: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Applies rotary position embeddings (Su et al., 2104.09864), rotating halves.

    Args:
      x: `[batch, time, heads, head_dim]` with an even `head_dim`.
      base: wavelength of the slowest pair, in bytes over 2 pi.
    """
    time, size = x.shape[1], x.shape[-1]
    rate = base ** (-jnp.arange(0, size, 2) / size)
    angle = (jnp.arange(time)[:, None] * rate)[:, None]  # [time, 1, head_dim / 2]
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate(
        [left * cos - right * sin, right * cos + left * sin], axis=-1
    )
