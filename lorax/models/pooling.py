"""Pools a sentence's hidden states into one embedding, as sentence-transformers does.

References:
  Reimers and Gurevych, Sentence-BERT, arXiv:1908.10084.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

MODES = ("mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
"""Named as in sentence-transformers."""

LEAST = 1e-12
"""Smallest norm to divide by, as in torch.nn.functional.normalize."""


class Pooling(NamedTuple):
    """How the hidden states of a row become its embedding.

    Attributes:
      mode: one of `MODES`: the mean of the real tokens, the first of them, the maximum
        of each feature, the sum over the square root of their number, the mean weighted
        by their positions from 1, or the last of them.
      normalize: scale embeddings to length 1.
    """

    mode: str = "mean"
    normalize: bool = True

    def __call__(self, hidden: jax.Array, real: jax.Array | None = None) -> jax.Array:
        """Returns float32 embeddings `[batch, width]`.

        Args:
          hidden: `[batch, time, width]`.
          real: bool `[batch, time]`, False for padding; None: all are real.

        Raises:
          ValueError: the mode is unknown.

        Example:
          >>> Pooling("mean", normalize=False)(jnp.arange(6.0).reshape(1, 3, 2))
          Array([[2., 3.]], dtype=float32)
        """
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r}; choose one of {', '.join(MODES)}")
        hidden = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
        real = jnp.ones(hidden.shape[:2], bool) if real is None else real
        pooled = _pooled(self.mode, hidden, real)
        if not self.normalize:
            return pooled
        square = jnp.sum(jnp.square(pooled), -1, keepdims=True)
        return pooled * jax.lax.rsqrt(jnp.maximum(square, LEAST**2))


def _pooled(mode: str, hidden: jax.Array, real: jax.Array) -> jax.Array:
    if mode == "max":
        return jnp.max(jnp.where(real[..., None], hidden, -jnp.inf), axis=1)
    if mode in ("cls", "lasttoken"):
        last = mode == "lasttoken"
        ahead = real[:, ::-1] if last else real
        at = jnp.argmax(ahead, axis=1)
        at = real.shape[1] - 1 - at if last else at
        return jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0]
    weights = real.astype(hidden.dtype)
    if mode == "weightedmean":
        weights = weights * jnp.cumsum(weights, axis=1)
    total = jnp.sum(hidden * weights[..., None], axis=1)
    count = jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1)
    return total / (jnp.sqrt(count) if mode == "mean_sqrt_len_tokens" else count)
