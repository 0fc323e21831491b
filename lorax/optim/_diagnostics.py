"""What Adam's state says of a step: how large, how downhill, how much of it is epsilon.

Near a minimum, g = H (theta - theta*). Where theta wanders isotropically with standard
deviation s, E[g g^T] = s^2 H^2, so

    sqrt(v_i) = s |row i of H|                     (s |H_ii| where H is diagonal)

and the second moment is a reading of curvature, up to one unknown factor.

References:
  Molybog et al., A Theory on Adam Instability in Large-Scale Machine Learning,
  arXiv:2304.09871.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorax.optim import _checks, _states
from lorax.types import Adapters


class AdamDiagnostics(NamedTuple):
    """Numbers to log beside the loss.

    Attributes:
      update_rms: [], root mean square of the update, learning rate included.
      cosine: [], of the update with the negative gradient; near 0 at large batches
        before a divergence. 0 where either is zero.
      below_epsilon: [], share of entries with sqrt(v) < eps, where Adam is slow SGD.
      curvature: sqrt(v) over its root mean square, in the structure of the moments: the
        relative size of the rows of the Hessian.
    """

    update_rms: jax.Array
    cosine: jax.Array
    below_epsilon: jax.Array
    curvature: Any


def adam_diagnostics(
    updates: Adapters,
    grads: Adapters,
    opt_state: optax.OptState,
    *,
    b2: _checks.Scalar = 0.999,
    eps: _checks.Scalar = 1e-8,
) -> AdamDiagnostics:
    """Reads one step of any optimiser that holds one Adam.

    Args:
      updates: what the optimiser returned, to be added to the adapters.
      grads: what it was given.
      opt_state: its state after the step.
      b2: of that Adam, for the bias of the second moment.
      eps: of that Adam.

    Returns:
      AdamDiagnostics; jit it with the step.

    Raises:
      ValueError: the state holds no Adam, or several.

    Example:
      >>> params = {"w": jnp.zeros(2)}
      >>> tx = optax.adam(0.1)
      >>> grads = {"w": jnp.array([1.0, 1e-9])}
      >>> updates, state = tx.update(grads, tx.init(params))
      >>> found = adam_diagnostics(updates, grads, state)
      >>> found.below_epsilon
      Array(0.5, dtype=float32)
    """
    adam = _states.find(opt_state, optax.ScaleByAdamState, "an Adam")
    correction = 1 - jnp.asarray(b2, jnp.float32) ** adam.count
    root = jax.tree.map(lambda v: jnp.sqrt(v / correction), adam.nu)
    flat = lambda tree: jnp.concatenate(
        [jnp.ravel(x).astype(jnp.float32) for x in jax.tree.leaves(tree)]
    )
    u, g, roots = flat(updates), flat(grads), flat(root)
    length = jnp.linalg.norm(u) * jnp.linalg.norm(g)
    mean = jnp.sqrt(jnp.mean(roots**2))
    return AdamDiagnostics(
        jnp.sqrt(jnp.mean(u**2)),
        jnp.where(length > 0, -jnp.vdot(u, g) / jnp.where(length > 0, length, 1), 0),
        jnp.mean(roots < eps),
        jax.tree.map(lambda r: r / jnp.where(mean > 0, mean, 1), root),
    )
