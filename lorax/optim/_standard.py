"""optax's own arithmetic under JAX's strict promotion."""

from __future__ import annotations

from typing import Any

import jax
import optax


def standard(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Returns a transformation of optax that works under strict promotion too.

    Its bias correction raises a float to an int32 count, which
    `jax_numpy_dtype_promotion="strict"` refuses. State and values are the same.

    Args:
      tx: a transformation without extra arguments.
    """

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(updates, state, params)

    return optax.GradientTransformation(tx.init, update_fn)
