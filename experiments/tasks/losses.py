"""Losses of generating models: the cross-entropy of target tokens."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorax import attention, losses
from lorax.models import experts, layers

AUTO = -1
"""A chunk that `chunk_for` chooses."""

LARGE = 2**26
"""Logits of a batch from which chunks pay: 256 MiB, and as much for their gradient."""


class Routers(NamedTuple):
    """Weights of the router losses of a mixture of experts.

    Attributes:
      balance: weight of `experts.balance_loss`; `AUTO`: from the model's config.json.
      z: weight of `experts.z_loss`.
    """

    balance: float = 0.0
    z: float = 0.0


UNWEIGHTED = Routers()


def make_causal(
    model: Any, smoothing: float = 0.0, chunk: int = AUTO, routers: Routers = UNWEIGHTED
) -> Callable[..., Any]:
    """Returns the cross-entropy of responses, `(params, batch) -> (mean, metrics)`.

    Args:
      model: maps tokens to logits, or to hidden states.
      smoothing: share of the target that is spread over the vocabulary.
      chunk: positions per row whose logits are computed at once; 0: all; or `AUTO`.
      routers: weights of the router losses.

    Raises:
      ValueError: router losses for a model without routers.
    """
    if any(routers):
        return _routed(model, smoothing, chunk, routers)

    def loss_fn(params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        packed = {k: batch[k] for k in ("segments", "positions") if k in batch}

        def read(**how: Any) -> jax.Array:
            return model.apply({"params": params}, batch["inputs"], **packed, **how)

        return of_model(model, params, batch, read, smoothing, chunk)

    return loss_fn


def _routed(
    model: Any, smoothing: float, chunk: int, routers: Routers
) -> Callable[..., Any]:
    """As `make_causal`, with router losses on all tokens except padding."""
    config = model.config
    if not hasattr(config, "experts"):
        raise ValueError(
            f"config.run: router_loss={routers.balance}, router_z_loss={routers.z}: "
            "the model has no routers; set both to 0.0"
        )
    balance = config.balance if routers.balance == AUTO else routers.balance

    def loss_fn(params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        packed = {k: batch[k] for k in ("segments", "positions") if k in batch}
        seen: dict[str, Any] = {}

        def read(**how: Any) -> jax.Array:
            out, told = model.apply(
                {"params": params},
                batch["inputs"],
                **packed,
                **how,
                mutable=[layers.ROUTING],
            )
            seen.update(told)
            return out

        loss, told = of_model(model, params, batch, read, smoothing, chunk)
        logits = experts.recorded(seen[layers.ROUTING])
        real = jnp.cumsum(batch["weights"][:, ::-1] > 0, axis=1)[:, ::-1] > 0
        real = attention.stripe(real) if config.striped else real
        loss += balance * experts.balance_loss(logits, config.chosen, real)
        return loss + routers.z * experts.z_loss(logits, real), told

    return loss_fn


def of_model(
    model: Any,
    params: Any,
    batch: Any,
    read: Callable[..., jax.Array],
    smoothing: float,
    chunk: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the weighted mean loss, and the metrics weight, nats and bytes.

    Args:
      model: has the head.
      params: of the model.
      batch: with `targets`, `weights` and `bytes`.
      read: returns the model's logits, or with `hidden=True` its hidden states.
      smoothing: share of the target that is spread over the vocabulary.
      chunk: positions per row whose logits are computed at once; 0: all; or `AUTO`.
    """
    if chunk == AUTO:
        chunk = chunk_for(batch["targets"].shape, model.config)
    if not chunk:
        return weighted(read(), batch, smoothing)
    found = losses.chunked_cross_entropy(
        read(hidden=True),
        model.head_of(params),
        batch["targets"],
        batch["weights"],
        chunk=chunk,
        label_smoothing=smoothing,
    )
    return found.mean, _told(found.weight, found.nats, batch)


def log_probs(model: Any, params: Any, batch: Any, chunk: int) -> jax.Array:
    """Returns the log-probability of every target, `[rows, positions]`.

    Args:
      model: maps tokens to logits, or to hidden states.
      params: of the model.
      batch: with `inputs` and `targets`.
      chunk: positions per row whose logits are computed at once; 0: all; or `AUTO`.
    """
    inputs, targets = batch["inputs"], batch["targets"]
    if chunk == AUTO:
        chunk = chunk_for(targets.shape, model.config)
    if not chunk:
        logits = model.apply({"params": params}, inputs)
        return -optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    hidden = model.apply({"params": params}, inputs, hidden=True)
    head = model.head_of(params)
    return losses.token_log_probs(hidden, head, targets, chunk=chunk)


def chunk_for(shape: tuple[int, int], config: Any) -> int:
    """Returns the chunk for a batch `[rows, positions]`; 0 if its logits are few."""
    if shape[0] * shape[1] * config.vocabulary < LARGE:
        return 0
    return losses.chunk_of((*shape, config.width), config.vocabulary)


def weighted(
    logits: jax.Array, batch: Any, smoothing: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns what `of_model` does, from logits."""
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    weight = batch["weights"].sum()
    total = (nll * batch["weights"]).sum()
    told = _told(weight, total, batch)
    if smoothing:
        spread = -jax.nn.log_softmax(logits).mean(-1)
        mixed = (1 - smoothing) * nll + smoothing * spread
        total = (mixed * batch["weights"]).sum()
    return total / jnp.maximum(weight, 1), told


def _told(weight: jax.Array, nats: jax.Array, batch: Any) -> dict[str, jax.Array]:
    return {"weight": weight, "nats": nats, "bytes": batch["bytes"].sum()}
