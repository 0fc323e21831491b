"""DeBERTa-v3, and v2 without its convolution: content and distance attend separately.

Each distance between query i and key j has an embedding, R after a layer norm. With
s = 1 + the number of further terms, a head scores

  score = (q_i k_j + q_i (R W_k)_d + k_j (R W_q)_d) / sqrt(s head_dim),  d = i - j.

The second term is "c2p", content to position, the third "p2c"; v3 shares W_q and W_k
with the content. Near distances have a row of R each, far ones share rows in
logarithmic steps. Otherwise the blocks are RoBERTa's; v3's tokens have no positions.

References:
  He et al., DeBERTa, arXiv:2006.03654. He et al., DeBERTaV3, arXiv:2111.09543.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lorax import attention
from lorax.models import context, deberta_config, hf_config, layers, roberta

Config = deberta_config.Config
entries = deberta_config.entries
ALIASES = deberta_config.ALIASES
FURTHER = deberta_config.FURTHER
HEADS = deberta_config.HEADS
IGNORED = deberta_config.IGNORED


def rows_of(time: int, config: Config) -> np.ndarray:
    """Returns the row of R for each pair of query and key, int `[time, time]`.

    Up to `buckets // 2` every distance has its own row; beyond, rows grow in
    logarithmic steps up to `max_distance`. Logarithms are float32, as in training:
    others round differently at the edges of buckets.
    """
    step = np.arange(time)
    away = step[:, None] - step[None]
    if config.buckets:
        half = config.buckets // 2
        far = np.maximum(np.abs(away), half).astype(np.float32)
        top = np.float32((config.max_distance - 1) / half)
        steps = np.log(far / np.float32(half)) / np.log(top) * np.float32(half - 1)
        steps = np.ceil(steps).astype(np.int64) + half
        away = np.where(np.abs(away) <= half, away, steps * np.sign(away))
    return np.clip(away + config.span, 0, 2 * config.span - 1)


class Block(roberta.Block):
    """One layer; see `layers.run_layers` for its arguments."""

    config: Config

    def _attend(self, x: jax.Array, shared: Any) -> jax.Array:
        to_q, to_k = self._heads("q"), self._heads("k")
        q, k, v = to_q(x), to_k(x), self._heads("v")(x)
        scale = ((1 + len(self.config.terms)) * q.shape[-1]) ** -0.5
        bias = None
        if self.config.terms:
            if not self.config.shared:
                to_q, to_k = self._heads("pos_q"), self._heads("pos_k")
            bias = scale * self._of_distances(q, k, to_q, to_k, shared)
        return attention.attend(q, k, v, mask=shared["mask"], bias=bias, scale=scale)

    def _of_distances(
        self, q: jax.Array, k: jax.Array, to_q: Any, to_k: Any, shared: Any
    ) -> jax.Array:
        """The further terms, `[batch, heads, time, time]`."""
        distances, found = self._drop(shared["distances"]), jnp.zeros(())
        if "c2p" in self.config.terms:
            found += _scores(q, to_k(distances, named=False), shared["rows"])
        if "p2c" in self.config.terms:
            of_keys = _scores(k, to_q(distances, named=False), shared["rows"].T)
            found += of_keys.swapaxes(-1, -2)
        return found


def _scores(content: jax.Array, distances: jax.Array, rows: jax.Array) -> jax.Array:
    """Scores each token against its distance to every token.

    Args:
      content: `[batch, time, heads, head_dim]`.
      distances: `[rows, heads, head_dim]`.
      rows: int `[time, time]`.

    Returns:
      `[batch, heads, time, time]`.
    """
    wide = jnp.promote_types(content.dtype, jnp.float32)
    scores = jnp.einsum(
        "bthd,rhd->bhtr", content, distances, preferred_element_type=wide
    )
    return jnp.take_along_axis(scores, rows[None, None], axis=-1)


class Model(nn.Module):
    """Maps tokens to logits of the sequence's class, or to hidden states."""

    config: Config

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        types: jax.Array | None = None,
        real: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Reads tokens.

        Args:
          tokens: int `[batch, time]`; the first real one is [CLS].
          types: int `[batch, time]`, token types; None: all are 0.
          real: bool `[batch, time]`, False for padding; None: all are real.
          deterministic: True disables dropout.

        Returns:
          Float32 logits `[batch, labels]`; without a head the hidden states `[batch,
          time, width]`, in the compute dtype.
        """
        config = self.config
        drop = nn.Dropout(config.dropout, deterministic=deterministic)
        x = self._embedded(tokens, types)
        x, _ = layers.run_layers(
            Block,
            config,
            drop(layers.layer_norm("norm_embed", config)(x)),
            None,
            {"mask": context.padding_mask(tokens, real), **self._known(tokens)},
            length=config.layers,
            names=roberta.NAMES,
            options=(deterministic,),
        )
        if config.head == "none":
            return x
        activation = hf_config.ACTIVATIONS[config.pooled]
        return roberta.classify(x, real, config, drop, activation)

    def _embedded(self, tokens: jax.Array, types: jax.Array | None) -> jax.Array:
        """The tokens' embeddings, with those of types and positions."""
        config, time = self.config, tokens.shape[1]
        x = layers.embedding(config.vocabulary, "embed", config)(tokens)
        if config.types:
            types = jnp.zeros_like(tokens) if types is None else types
            x = x + layers.embedding(config.types, "embed_types", config)(types)
        elif types is not None:
            raise ValueError("this model has no embedding of types; leave types out")
        if config.absolute:
            if time > config.positions:
                raise ValueError(
                    f"{time} tokens, but there are {config.positions} positions"
                )
            places = layers.embedding(config.positions, "embed_positions", config)
            x = x + places(jnp.arange(time))
        return x

    def _known(self, tokens: jax.Array) -> dict[str, jax.Array]:
        """What every layer receives about distances."""
        config = self.config
        if not config.terms:
            return {}
        rows = rows_of(tokens.shape[1], config)
        embed = layers.embedding(2 * config.span, "embed_distances", config)
        distances = embed(jnp.arange(2 * config.span))
        if config.norm_distances:
            distances = layers.layer_norm("norm_distances", config)(distances)
        return {"distances": distances, "rows": jnp.asarray(rows, jnp.int32)}
