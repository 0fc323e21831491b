"""Signs of a momentum, with decay for the arrays that declare it.

    m <- momentum m + (1 - momentum) g,    step = -rate (sign(m) + weight_decay p)

References:
  Bernstein et al., signSGD: Compressed Optimisation for Non-Convex Problems,
  arXiv:1802.04434.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorax import optim


class SignumState(NamedTuple):
    """The momentum, in the structure of the adapters."""

    momentum: Any


def scale_by_signum(momentum: float) -> optax.GradientTransformation:
    """Returns the signs of a running mean of the gradients."""

    def init_fn(params: Any) -> SignumState:
        return SignumState(jax.tree.map(jnp.zeros_like, params))

    def update_fn(updates: Any, state: SignumState, params: Any = None) -> Any:
        del params
        mean = lambda m, g: momentum * m + (1 - momentum) * g
        mixed = jax.tree.map(mean, state.momentum, updates)
        return jax.tree.map(jnp.sign, mixed), SignumState(mixed)

    return optax.GradientTransformation(init_fn, update_fn)


def signum(
    learning_rate: Any, momentum: float = 0.9, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Returns the optimiser."""
    return optax.chain(
        scale_by_signum(momentum),
        optim.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
