"""Losses of models that write: cross-entropy of what is to be written."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def make_causal(model: Any, smoothing: float = 0.0) -> Callable[..., Any]:
    """Cross-entropy of the responses, `(params, batch) -> (mean nats, metrics)`.

    Args:
      model: tokens to logits.
      smoothing: share of the target that is spread over the vocabulary.
    """

    def loss_fn(params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        packed = {k: batch[k] for k in ("segments", "positions") if k in batch}
        logits = model.apply({"params": params}, batch["inputs"], **packed)
        return weighted(logits, batch, smoothing)

    return loss_fn


def weighted(
    logits: jax.Array, batch: Any, smoothing: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The mean over the weights, with nats and bytes of the sums beside it."""
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    weight = batch["weights"].sum()
    total = (nll * batch["weights"]).sum()
    told = {"weight": weight, "nats": total, "bytes": batch["bytes"].sum()}
    if smoothing:
        spread = -jax.nn.log_softmax(logits).mean(-1)
        mixed = (1 - smoothing) * nll + smoothing * spread
        total = (mixed * batch["weights"]).sum()
    return total / jnp.maximum(weight, 1), told
