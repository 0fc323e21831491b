"""Cross-entropy from hidden states and a head, without the logits of all tokens.

For a token with hidden state h, logits l = h W and target t,

    nll  = logsumexp(l) - l_t
    loss = (1 - s) nll + s (logsumexp(l) - mean(l)) + z logsumexp(l)^2

with label smoothing s and z-loss z. Logits are computed a few positions at a time,
together with their part of the gradient: no array of size tokens x vocabulary is ever
held, and nothing is computed twice.

References:
  Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, arXiv:2411.09009.
  Chowdhery et al., PaLM, arXiv:2204.02311 (z-loss).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lorax import _sweep
from lorax.losses import heads
from lorax.losses.heads import Head


class CrossEntropy(NamedTuple):
    """Sums over tokens.

    Attributes:
      total: sum of the weighted losses, smoothing and z-loss included.
      nats: sum of the weighted negative log-likelihoods alone; has no gradient.
      weight: sum of the weights; has no gradient.
    """

    total: jax.Array
    nats: jax.Array
    weight: jax.Array

    @property
    def mean(self) -> jax.Array:
        """The loss per unit of weight; 0 where nothing has weight."""
        return self.total / jnp.where(self.weight > 0, self.weight, 1)


def chunked_cross_entropy(
    hidden: jax.Array,
    head: Head | jax.Array,
    targets: jax.Array,
    weights: jax.Array | None = None,
    *,
    chunk: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> CrossEntropy:
    """Next-token cross-entropy, computed a few positions of every row at a time.

    Inside `lorax.adapt` the head may be adapted, tied, quantised, or all of these; its
    low-rank branch is applied to every chunk. On a mesh, a head sharded along its width
    is gathered once, and one sharded along the vocabulary stays sharded: enter
    `jax.set_mesh(mesh)` around the step. The gradient of a head that is trained in full
    on several devices is summed over them once per chunk, not once per step.

    Args:
      hidden: `[*batch, time, width]`, what the head reads, in the compute dtype.
      head: a `Head`, or a kernel `[width, vocabulary]`; cast to that dtype.
      targets: int `[*batch, time]`.
      weights: of the tokens, `[*batch, time]`, such as 0 for padding, whose targets
        are then ignored; None: all count once.
      chunk: positions of every row in a chunk; None: see `chunk_of`.
      label_smoothing: share of the target to spread over the vocabulary.
      z_loss: weight of the squared log-partition (PaLM: 1e-4).

    Returns:
      The sums, float32; `.mean` is the loss, and `.weight` what a train step calls
      `metrics["weight"]`.

    Raises:
      ValueError: shapes do not match, or options are out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> hidden, kernel = jnp.ones((2, 8, 4)), jnp.zeros((4, 16))
      >>> loss = chunked_cross_entropy(hidden, kernel, jnp.zeros((2, 8), int), chunk=2)
      >>> print(round(float(loss.mean), 4), float(loss.weight))  # log(16)
      2.7726 16.0

    References:
      Wijmans et al., arXiv:2411.09009.
    """
    head = heads.checked(hidden, head, targets, chunk)
    if not 0 <= label_smoothing < 1 or z_loss < 0:
        raise ValueError(
            f"label_smoothing={label_smoothing}, z_loss={z_loss}; the first must be in "
            "[0, 1), the second must be at least 0"
        )
    if weights is None:
        weights = jnp.ones_like(targets, jnp.float32)
    elif weights.shape != targets.shape:
        raise ValueError(
            f"weights has shape {weights.shape} and targets {targets.shape}; give "
            "every token one weight"
        )
    step = functools.partial(
        _losses,
        tied=head.tied,
        soft_cap=head.soft_cap,
        smoothing=float(label_smoothing),
        z_loss=float(z_loss),
    )
    size = chunk or heads.chunk_of(hidden.shape, head.vocabulary)
    parts = [heads.cut(x, size, hidden.ndim - 2) for x in (hidden, targets, weights)]
    total, nats = _sweep.swept(step, heads.shared(head, hidden), parts)
    weight = jnp.sum(weights, dtype=jnp.float32)
    return CrossEntropy(total, *jax.lax.stop_gradient((nats, weight)))


def token_log_probs(
    hidden: jax.Array,
    head: Head | jax.Array,
    targets: jax.Array,
    *,
    chunk: int | None = None,
) -> jax.Array:
    """The log-probability of every target, for losses other than its mean.

    The backward pass computes the logits of a chunk again, because it is not known in
    advance what a loss does with the result (DPO, GRPO, distillation).

    Args:
      hidden: `[*batch, time, width]`, as for `chunked_cross_entropy`.
      head: likewise.
      targets: int `[*batch, time]`, each in the vocabulary.
      chunk: likewise.

    Returns:
      `[*batch, time]`, float32.

    Raises:
      ValueError: shapes do not match, or options are out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> hidden, kernel = jnp.ones((2, 8, 4)), jnp.zeros((4, 16))
      >>> token_log_probs(hidden, kernel, jnp.zeros((2, 8), int)).shape
      (2, 8)
    """
    head = heads.checked(hidden, head, targets, chunk)
    kernel, bias = heads.shared(head, hidden)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # inside scan
    def step(hidden: jax.Array, targets: jax.Array) -> jax.Array:
        logits = heads.logits(hidden, kernel, bias, head.tied, head.soft_cap)
        return _at(logits, targets) - jax.nn.logsumexp(logits, axis=-1)

    axis = hidden.ndim - 2
    size = chunk or heads.chunk_of(hidden.shape, head.vocabulary)
    parts = [heads.cut(x, size, axis) for x in (hidden, targets)]
    found = jax.lax.scan(lambda _, xs: (None, step(*xs)), None, parts)[1]
    return heads.joined(found, axis)[..., : targets.shape[-1]]


def _losses(
    shared: tuple[jax.Array, jax.Array | None],
    chunk: tuple[jax.Array, jax.Array, jax.Array],
    *,
    tied: bool,
    soft_cap: float | None,
    smoothing: float,
    z_loss: float,
) -> tuple[jax.Array, jax.Array]:
    """The total of a chunk, and its nats."""
    hidden, targets, weights = chunk
    logits = heads.logits(hidden, *shared, tied, soft_cap)
    partition = jax.nn.logsumexp(logits, axis=-1)
    loss = nll = partition - _at(logits, targets)
    if smoothing:
        spread = partition - jnp.mean(logits, axis=-1)
        loss = (1 - smoothing) * nll + smoothing * spread
    if z_loss:
        loss = loss + z_loss * jnp.square(partition)
    weights = weights.astype(loss.dtype)
    return jnp.sum(weights * loss), jnp.sum(weights * nll)


def _at(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The logits of the targets, as a sum, which a sharded vocabulary can share."""
    places = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    return jnp.sum(jnp.where(places == targets[..., None], logits, 0), axis=-1)
