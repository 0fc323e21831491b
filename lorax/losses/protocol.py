"""The loss that a train step takes, and the checks on its output.

    loss_fn(params, model_state, batch, key) -> (loss, (metrics, model_state))

`model_state` is what the model carries from step to step without training it
(BatchNorm statistics, `nnx` counts), and `key` is None at evaluation. If a train step
has a reference, the reference's output for the batch is one more argument after the
key. `metrics["weight"]`, where given, is the number of target tokens (or pairs, ...)
that `loss` is the mean over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lorax.types import PyTree

LossFn = Callable[..., tuple[jax.Array, Any]]
Reference = Callable[[PyTree, PyTree, PyTree], Any]
"""`(frozen, params, batch) -> what models that do not train return for the batch`."""
Metrics = dict[str, Any]

RESERVED = ("loss", "grad_norm", "skipped")


def simple_loss(fn: Callable[..., Any]) -> LossFn:
    """Turns `fn(params, batch) -> loss` or `(loss, metrics)` into the full protocol.

    Args:
      fn: a loss that needs no key and carries no model state; with a reference,
        `fn(params, batch, said)`.

    Returns:
      A loss in the protocol of `make_train_step`.

    Example:
      >>> loss_fn = simple_loss(lambda params, batch: params["w"] * batch)
      >>> loss_fn({"w": 2.0}, {}, 3.0, None)
      (6.0, ({}, {}))
    """

    def loss_fn(
        params: PyTree, model_state: PyTree, batch: PyTree, key: Any, *said: Any
    ) -> Any:
        del key
        out = fn(params, batch, *said)
        loss, metrics = out if isinstance(out, tuple) else (out, {})
        return loss, (metrics, model_state)

    return loss_fn


def checked(loss_fn: LossFn) -> LossFn:
    """Returns the loss with its output checked against the protocol."""
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function; got {loss_fn!r}")

    def checked(params: PyTree, model_state: PyTree, *args: Any) -> Any:
        # Rebuilt here, nnx Variables belong to this trace and may be written to.
        fresh = jax.tree.map(lambda leaf: leaf, model_state)
        out = loss_fn(params, fresh, *args)
        try:
            loss, (metrics, new_state) = out
        except (TypeError, ValueError):
            raise ValueError(
                "loss_fn must return (loss, (metrics, model_state)); it returned "
                f"{jax.tree.structure(out)}. For a plain loss use simple_loss(loss_fn)"
            ) from None
        _check_metrics(loss, metrics)
        return loss, (metrics, _same_kind(new_state, model_state))

    return checked


def _check_metrics(loss: jax.Array, metrics: Any) -> None:
    if shape := jnp.shape(loss):
        raise ValueError(f"the loss has shape {shape}; return its mean, a scalar")
    if not isinstance(metrics, dict):
        raise ValueError(f"metrics must be a dict; loss_fn returned {type(metrics)}")
    if taken := [name for name in RESERVED if name in metrics]:
        raise ValueError(f"the step reports {taken} itself; rename these metrics")
    if shape := jnp.shape(metrics.get("weight", 1.0)):
        raise ValueError(
            f'metrics["weight"] has shape {shape}; return the number of target tokens'
        )


def _same_kind(new: PyTree, old: PyTree) -> PyTree:
    """Returns `new` in the dtypes of `old`; ValueError if the trees differ."""
    given, returned = _kind(old), _kind(new)
    if returned != given:
        raise ValueError(
            f"loss_fn was given a model_state {given} and returned {returned}; it "
            "must return the same tree (create_state takes the first one)"
        )
    return jax.tree.map(cast, new, old)


def _kind(tree: PyTree) -> tuple[Any, list[tuple[int, ...]]]:
    """Structure and shapes."""
    return jax.tree.structure(tree), [jnp.shape(x) for x in jax.tree.leaves(tree)]


def cast(new: Any, old: Any) -> jax.Array:
    """Returns `new` in the dtype of `old`, strongly typed, as states are."""
    dtype = jnp.result_type(old)
    if jnp.issubdtype(dtype, jax.dtypes.extended):  # PRNG keys stay as they are
        return new
    return jax.lax.convert_element_type(new, dtype)
