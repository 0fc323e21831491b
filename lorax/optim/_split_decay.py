"""Weight decay of the product, half on each factor, that does not affect the step.

    sigma = sqrt(1 - lr weight_decay),    a <- sigma a + u_a / sigma,    b likewise

so that, up to a second-order term,

    a b <- (1 - lr weight_decay) a b + u_a b + a u_b

as when a whole kernel decays. Decaying both factors at the usual strength would
multiply the product by (1 - lr weight_decay)^2 and shrink the factors under the step.

The equations come from a published summary of the paper and were re-derived here; the
paper's own text was not available.

References:
  Cesista et al., LoRA-Muon: Spectral Steepest Descent on the Low-Rank Manifold,
  arXiv:2606.12921.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorax import _checks
from lorax.optim import _states, _trees
from lorax.types import Adapters


class SplitDecayState(NamedTuple):
    """The step count for the schedules.

    Attributes:
      count: updates so far, int32.
    """

    count: jax.Array  # type: ignore[assignment]


def split_decay(
    weight_decay: _checks.NumberOrSchedule, learning_rate: _checks.NumberOrSchedule
) -> optax.GradientTransformationExtraArgs:
    """Decays the product of every pair by `lr * weight_decay`.

    Put it last in the chain, after the learning rate: it reads whole steps. Other
    leaves pass through.

    Args:
      weight_decay: strength, at least 0; a number or a schedule.
      learning_rate: the learning rate of the steps, a number or a schedule.

    Returns:
      An optax transformation; `update` needs the adapters, as `params`.

    Raises:
      ValueError: a negative strength, or one that decays the product past zero; at
        `init`, an AdaLora; at `update`, no adapters.

    Example:
      >>> from lorax.adapters import Lora
      >>> from lorax.types import Axes
      >>> w = {"w": Lora(jnp.ones((1, 1)), jnp.ones((1, 1)), 1.0, Axes((0,), (1,)))}
      >>> tx = split_decay(3.0, 0.25)  # of the product a quarter is left
      >>> updates, _ = tx.update(jax.tree.map(jnp.zeros_like, w), tx.init(w), w)
      >>> updates["w"].a.item(), updates["w"].b.item()
      (-0.5, -0.5)
    """
    _checks.at_least("weight_decay", weight_decay, schedule=True)
    _checks.at_least("learning_rate", learning_rate, schedule=True)
    decay, rate = _checks.known(weight_decay), _checks.known(learning_rate)
    if decay is not None and rate is not None and not decay * rate < 1:
        raise ValueError(
            f"weight_decay={decay:g} at learning_rate={rate:g} decays the product of a "
            "and b past zero; keep weight_decay * learning_rate below 1"
        )

    def init_fn(params: Adapters) -> SplitDecayState:
        _trees.require_pairs(params, "split_decay")
        return SplitDecayState(jnp.zeros((), jnp.int32))

    def update_fn(
        updates: Adapters,
        state: SplitDecayState,
        params: Adapters | None = None,
        **extra: Any,
    ) -> tuple[Adapters, SplitDecayState]:
        del extra
        given = _trees.require_params(params)
        both = (weight_decay, learning_rate)
        decay, rate = (x(state.count) if callable(x) else x for x in both)
        lost = jnp.asarray(decay * rate, jnp.float32)
        sigma = jnp.sqrt(1 - lost)
        less = lost / (1 + sigma)  # 1 - sigma, without cancellation

        def decayed(u: jax.Array, w: jax.Array, on: bool) -> jax.Array:
            return (u / sigma - less * w).astype(u.dtype) if on else u

        new = jax.tree.map(decayed, updates, given, _trees.factor_mask(updates))
        return new, SplitDecayState(optax.safe_increment(state.count))

    return _states.transformation(init_fn, update_fn)
