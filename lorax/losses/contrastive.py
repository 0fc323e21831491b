"""Contrastive loss of pairs, with the other rows of the batch as negatives.

References:
  van den Oord et al., InfoNCE, arXiv:1807.03748. Henderson et al., multiple negatives
  ranking, arXiv:1705.00652. Reimers and Gurevych, Sentence-BERT, arXiv:1908.10084.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

SCALE = 20.0
"""Scale of cosines, as in sentence-transformers: a temperature of 0.05."""


def in_batch_negatives(
    anchors: jax.Array,
    positives: jax.Array,
    *,
    scale: float = SCALE,
    groups: jax.Array | None = None,
    symmetric: bool = False,
) -> jax.Array:
    """Returns the loss of every row, float32 `[batch]`, in nats.

    The loss of row i is -log softmax_j(scale <anchor_i, positive_j>) at j = i. It
    depends on the whole batch: under a mesh with a data axis, the rows of all devices
    are each other's negatives.

    Args:
      anchors: `[batch, width]`, of unit length if the products are to be cosines.
      positives: likewise.
      scale: of the products, the inverse of the temperature.
      groups: int `[batch]`; other rows of the same group are not negatives. None: all
        other rows are.
      symmetric: average with the loss of finding the anchor of each positive.

    Raises:
      ValueError: the shapes are not two equal `[batch, width]`.

    Example:
      >>> loss = in_batch_negatives(jnp.eye(2), jnp.eye(2), scale=1.0)
      >>> [f"{nats:.4f}" for nats in loss]
      ['0.3133', '0.3133']
    """
    if anchors.ndim != 2 or anchors.shape != positives.shape:
        raise ValueError(
            f"anchors {anchors.shape} and positives {positives.shape}: give two arrays "
            "[batch, width] of the same shape"
        )
    kind = jnp.promote_types(anchors.dtype, jnp.float32)
    scores = scale * jnp.matmul(
        anchors.astype(kind),
        positives.astype(kind).T,
        precision=jax.lax.Precision.HIGHEST,
    )
    if groups is not None:
        same = groups[:, None] == groups[None, :]
        others = ~jnp.eye(len(groups), dtype=bool)
        scores = jnp.where(same & others, -jnp.inf, scores)
    right = jnp.diagonal(scores)
    forward = jax.nn.logsumexp(scores, axis=1) - right
    if not symmetric:
        return forward
    return (forward + jax.nn.logsumexp(scores, axis=0) - right) / 2
