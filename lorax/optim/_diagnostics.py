"""Diagnostics of Adam: step sizes, step directions, and what v says about the Hessian.

Near a minimum g ~ H (theta - theta*), and if theta wanders with standard deviation s in
every direction,

    E[g g^T] = s^2 H^2,    sqrt(v_i) = s |row i of H|

which is s |H_ii| if H is diagonal, and larger if not. The paper below explains
divergence at large batch sizes by updates that grow and become uncorrelated with the
descent direction. A gradient below epsilon turns Adam into slow SGD: the gradient of
`a` is proportional to b, so `a` may start in that regime while b takes sign-like steps.
Nothing here changes the training step.

References:
  Molybog et al., A Theory on Adam Instability in Large-Scale Machine Learning,
  arXiv:2304.09871. Su, article 10588 of kexue.fm.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorax import tree
from lorax.optim import _states
from lorax.types import Adapters


class AdamDiagnostics(NamedTuple):
    """Diagnostics of the leaves of one role, or of all leaves.

    Attributes:
      update_rms: root mean square of the update, including the learning rate.
      descent_cosine: cosine of the update with minus the gradient; 0 if either is zero.
      below_epsilon: the fraction of elements with sqrt(v) < eps.
      root_v: root mean square of sqrt(v).
    """

    update_rms: jax.Array
    descent_cosine: jax.Array
    below_epsilon: jax.Array
    root_v: jax.Array


def adam_diagnostics(
    grads: Adapters,
    updates: Adapters,
    opt_state: optax.OptState,
    *,
    eps: float = 1e-8,
    b2: float = 0.999,
) -> dict[str, AdamDiagnostics]:
    """Returns diagnostics of Adam's step by role, since the factors behave differently.

    Args:
      grads: the gradients given to the optimiser.
      updates: the updates it returned.
      opt_state: the state it returned, containing one `optax.ScaleByAdamState`, or
        several for disjoint leaves (`optax.partition`).
      eps: the optimiser's epsilon; 1e-8 as in optax.
      b2: the optimiser's b2, to correct v for its bias; 0.999 as in optax.

    Returns:
      `{role: AdamDiagnostics}` for the roles in the tree ("a", "b", ...), and "all";
      float32 scalars. Leaves that Adam does not train are left out.

    Raises:
      ValueError: b2 out of range, no Adam state, or two for one leaf.

    Example:
      >>> from lorax.adapters import Full
      >>> tx, adapters = optax.adam(0.1), {"bias": Full(jnp.zeros(2))}
      >>> grads = {"bias": Full(jnp.array([3.0, 0.0]))}
      >>> updates, state = tx.update(grads, tx.init(adapters))
      >>> info = adam_diagnostics(grads, updates, state)["value"]
      >>> [round(float(x), 4) for x in info]  # -0.1 and 0; sqrt(v) is 3 and 0
      [0.0707, 1.0, 0.5, 2.1213]
    """
    seconds = _second_moments(opt_state, b2)
    pieces: dict[str, list[tuple[jax.Array, ...]]] = {"all": []}
    for path, field in sorted(seconds):
        role = grads[path].roles[field]
        trees = (getattr(grads[path], field), getattr(updates[path], field))
        piece = (*map(_flat, trees), jnp.sqrt(_flat(seconds[path, field])))
        pieces["all"].append(piece)
        pieces.setdefault(role, []).append(piece)
    return {role: _summary(found, eps) for role, found in pieces.items()}


def hessian_row_norms(
    adapters: Adapters, opt_state: optax.OptState, wander: float, *, b2: float = 0.999
) -> Adapters:
    """Returns sqrt(v) / s, Adam's estimate of the norms of the Hessian's rows.

    This is the absolute diagonal if H is diagonal and larger otherwise, so do not take
    it for |H_ii| if H has large off-diagonal entries. It is valid near a minimum, where
    the gradient's noise comes from parameters that wander equally in all directions,
    and for a b2 that averages over many such steps; elsewhere v reflects the gradient.

    Args:
      adapters: the parameters, for the shapes and for leaves that Adam does not train.
      opt_state: as in `adam_diagnostics`.
      wander: s, the standard deviation of each parameter about the minimum.
      b2: the optimiser's b2.

    Returns:
      An adapter tree of row norms, float32; NaN for leaves that Adam does not train.

    Raises:
      ValueError: `wander` not positive, b2 out of range, no Adam state, or two for one
        leaf.

    Example:
      >>> from lorax.adapters import Full
      >>> tx, adapters = optax.adam(0.1), {"bias": Full(jnp.zeros(2))}
      >>> state = tx.update({"bias": Full(jnp.array([3.0, 0.5]))}, tx.init(adapters))[1]
      >>> hessian_row_norms(adapters, state, wander=0.5)["bias"].value.round(4)
      Array([6., 1.], dtype=float32)
    """
    if not wander > 0:
        raise ValueError(f"wander={wander}; give a standard deviation > 0")
    seconds = _second_moments(opt_state, b2)

    def rows(path: str, adapter: Any) -> Any:
        v = {
            f: seconds.get((path, f), jnp.full(getattr(adapter, f).shape, jnp.nan))
            for f in adapter.roles
        }
        return dataclasses.replace(
            adapter,
            **{f: jnp.sqrt(x.astype(jnp.float32)) / wander for f, x in v.items()},
        )

    return tree.map_adapters(rows, adapters)


def _second_moments(opt_state: Any, b2: float) -> dict[tuple[str, str], jax.Array]:
    """The debiased v of every leaf that has one, by (path, field)."""
    if not 0 < b2 < 1:
        raise ValueError(f"b2={b2}; give the optimiser's b2, between 0 and 1")
    found: dict[tuple[str, str], jax.Array] = {}
    for state in _states.states(opt_state, optax.ScaleByAdamState):
        nu = state.nu if isinstance(state.nu, Mapping) else {}
        for path, adapter in nu.items():
            for field in getattr(adapter, "roles", ()):
                leaf = getattr(adapter, field)
                if not hasattr(leaf, "dtype"):  # a MaskedNode of optax.partition
                    continue
                if (path, field) in found:
                    raise ValueError(
                        f"{path}: two Adams train its {field!r}; pass the state of one"
                    )
                # the divisor is 1 - b2^count, of which float32 would keep five digits
                found[path, field] = leaf / -jnp.expm1(state.count * math.log(b2))
    if not found:
        raise ValueError(
            "the optimiser state holds no optax.ScaleByAdamState over adapters; these "
            "diagnostics read Adam's second moment (optax.adam, adamw, or a chain of "
            "them)"
        )
    return found


def _flat(x: jax.Array) -> jax.Array:
    return jnp.ravel(x).astype(jnp.float32)


def _summary(pieces: list[tuple[jax.Array, ...]], eps: float) -> AdamDiagnostics:
    """From (gradient, update, sqrt(v)) of every leaf, flat."""
    size = sum(root.size for _, _, root in pieces)

    def total(f: Callable[..., jax.Array]) -> jax.Array:
        return sum((jnp.sum(f(*piece)) for piece in pieces), jnp.zeros(()))

    gg, uu = total(lambda g, u, root: g**2), total(lambda g, u, root: u**2)
    norms = jnp.sqrt(gg) * jnp.sqrt(uu)
    dot = -total(lambda g, u, root: g * u)
    return AdamDiagnostics(
        update_rms=jnp.sqrt(uu / size),
        descent_cosine=jnp.where(norms > 0, dot / jnp.where(norms > 0, norms, 1), 0.0),
        below_epsilon=total(lambda g, u, root: root < eps) / size,
        root_v=jnp.sqrt(total(lambda g, u, root: root**2) / size),
    )
