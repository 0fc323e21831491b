"""Adam as used by every optimiser here: optax's, with its hyperparameters checked."""

from __future__ import annotations

from typing import Any

import jax
import optax

from lorax import _checks


def standard(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Returns an optax transformation that also works under strict promotion.

    optax's bias correction raises a float to an int32 count, which
    `jax_numpy_dtype_promotion="strict"` refuses. State and values are the same.

    Args:
      tx: a transformation without extra arguments.
    """

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(updates, state, params)

    return optax.GradientTransformation(tx.init, update_fn)


def adam(
    b1: _checks.Number, b2: _checks.Number, eps: _checks.Number
) -> optax.GradientTransformation:
    """Returns `optax.scale_by_adam` with its hyperparameters checked."""
    check_moments(b1, b2, eps)
    return standard(optax.scale_by_adam(b1, b2, eps))


def check_moments(b1: _checks.Number, b2: _checks.Number, eps: _checks.Number) -> None:
    """Raises ValueError for Adam hyperparameters that are out of range."""
    _checks.average("b1", b1)
    _checks.average("b2", b2)
    _checks.positive("eps", eps)
