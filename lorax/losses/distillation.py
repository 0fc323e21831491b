"""Distillation: how far a student's next-token distribution is from a teacher's.

With p the teacher's distribution at a position and q the student's, both from logits
divided by a temperature, and the mixture m = beta p + (1 - beta) q,

    beta = 0        KL(p | q)       forward: the student covers what the teacher does
    beta = 1        KL(q | p)       reverse: it keeps to what the teacher finds likely
    in between      beta KL(p | m) + (1 - beta) KL(q | m)       generalised JSD

The logits of teacher and student are computed together, a few positions at a time, with
their part of the gradient in the same sweep: those of all tokens are never held.

References:
  Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, arXiv:1503.02531.
  Agarwal et al., On-Policy Distillation of Language Models (GKD), arXiv:2306.13649.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lorax import _sweep
from lorax.losses import heads
from lorax.losses.heads import Head


class Predictions(NamedTuple):
    """What a model predicts the next tokens from.

    Attributes:
      hidden: `[*batch, time, width]`, what its head reads, in the compute dtype.
      head: the head.
    """

    hidden: jax.Array
    head: Head | jax.Array


class Divergence(NamedTuple):
    """Sums over tokens.

    Attributes:
      total: sum of the weighted divergences.
      weight: sum of the weights; has no gradient.
    """

    total: jax.Array
    weight: jax.Array

    @property
    def mean(self) -> jax.Array:
        """The divergence per unit of weight; 0 where nothing has weight."""
        return self.total / jnp.where(self.weight > 0, self.weight, 1)


def chunked_divergence(
    student: Predictions,
    teacher: Predictions,
    weights: jax.Array,
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Divergence:
    """Divergence of a student from its teacher, a few positions of every row at a time.

    Inside `lorax.adapt` the student's head may be adapted, tied or quantised, as for
    `chunked_cross_entropy`. The teacher is used as given: it has no gradient unless
    you differentiate with respect to it.

    Args:
      student: its hidden states and its head.
      teacher: likewise, of any width, with the same vocabulary.
      weights: of the tokens, `[*batch, time]`, such as 0 for prompts and padding.
      beta: 0: forward KL, the default, as in Hinton et al.; 1: reverse KL; between
        them the generalised JSD of GKD. TRL 1.16 defines it the same way; the default
        is 1.0 in its `DistillationConfig` and 0.5 in its `GKDConfig`.
      temperature: divides both logits (TRL: 1.0). The result is not multiplied by its
        square, as Hinton et al. do where they add a second loss.
      chunk: positions of every row in a chunk; None: half of what `chunk_of` returns,
        because there are two sets of logits.

    Returns:
      The sums, float32; `.mean` is the loss, and `.weight` what a train step calls
      `metrics["weight"]`.

    Raises:
      ValueError: shapes or vocabularies do not match, or options are out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> hidden, kernel = jnp.ones((2, 8, 4)), jnp.eye(4, 16)
      >>> same = Predictions(hidden, kernel)
      >>> float(chunked_divergence(same, same, jnp.ones((2, 8))).mean)
      0.0

    References:
      Agarwal et al., arXiv:2306.13649, equation 1.
    """
    if not 0 <= beta <= 1 or not temperature > 0:
        raise ValueError(
            f"beta={beta}, temperature={temperature}; the first must be in [0, 1], the "
            "second must be above 0"
        )
    both = [
        (x.hidden, heads.checked(x.hidden, x.head, weights, chunk))
        for x in (student, teacher)
    ]
    (hidden, head), (_, other) = both
    if head.vocabulary != other.vocabulary:
        raise ValueError(
            f"the student has {head.vocabulary} tokens and the teacher "
            f"{other.vocabulary}; they must share one vocabulary. If one merely has "
            "more rows for padding, cut its head to the size of the other"
        )
    step = functools.partial(
        _divergences,
        how=tuple((own.tied, own.soft_cap) for _, own in both),
        beta=float(beta),
        temperature=float(temperature),
    )
    size = chunk or -(-heads.chunk_of(hidden.shape, head.vocabulary) // 2)
    axis = hidden.ndim - 2
    parts = [heads.cut(x, size, axis) for x in (*(x for x, _ in both), weights)]
    shared = [heads.shared(own, x) for x, own in both]
    (total,) = _sweep.swept(step, shared, parts)
    weight = jnp.sum(weights, dtype=jnp.float32)
    return Divergence(total, jax.lax.stop_gradient(weight))


def _divergences(
    shared: list[tuple[jax.Array, jax.Array | None]],
    chunk: list[jax.Array],
    *,
    how: tuple[tuple[bool, float | None], ...],
    beta: float,
    temperature: float,
) -> tuple[jax.Array]:
    """The total of a chunk."""
    *hidden, weights = chunk
    log_q, log_p = (
        jax.nn.log_softmax(heads.logits(x, *read, *own) / temperature)
        for x, read, own in zip(hidden, shared, how, strict=True)
    )
    if beta == 0:
        found = _kl(log_p, log_q)
    elif beta == 1:
        found = _kl(log_q, log_p)
    else:
        log_m = jnp.logaddexp(log_p + jnp.log(beta), log_q + jnp.log1p(-beta))
        found = beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    return (jnp.sum(weights.astype(found.dtype) * found),)


def _kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(p | q) at every position."""
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
