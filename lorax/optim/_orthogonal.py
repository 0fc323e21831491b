"""AdaLoRA's pull of p and q towards orthonormality, in three forms.

With G = p^T p - I for one of M matrices (and the same for q, transposed):

    decoupled:  p <- p + u - min(w |u| / |p|, 1/8) 4 p G / max(1, |G|)
    squared:    g <- g + w 4 p G / M
    norm:       g <- g + w p G / (M |G|)

where g is the gradient that the optimiser gets and u the update that it returns.
"squared" and "norm" are the gradients of `lorax.adapters.orthogonal_penalty`; they go
through the optimiser's moments. While lam = 0 at the start, p and q get no gradient
from the task, so Adam's first moments contain only the penalty, and Adam takes a full
step for it whatever its weight. "decoupled" keeps the moments for the task, as AdamW
does with decay. Like that decay it follows the learning rate, here through |u| / |p|,
the fraction of p that the optimiser moves, for any optimiser and schedule. Each matrix
takes its own step, whatever their number.

Every singular value s of p goes to s (1 - 4 c (s^2 - 1) / max(1, |G|)), and |G| is at
least |s^2 - 1|: with c <= 1/8 none can change its sign or grow without bound, and near
1 the distance shrinks by a factor of 1 - 8 c per step. c = 1/8 is Newton's step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lorax import _checks, linalg
from lorax.adapters import AdaLora, pairs
from lorax.types import Adapters

WEIGHTS = {"decoupled": 0.3, "squared": 0.001, "norm": 0.1}
"""The default weight of every form."""

NEWTON = 0.125
"""The largest c: near orthonormality, it takes the whole step."""


def check(form: str, weight: _checks.Number) -> None:
    """Raises ValueError for an unknown form, or a weight out of range."""
    if form not in WEIGHTS:
        raise ValueError(
            f"orthogonal_form={form!r}; choose 'decoupled' (a step after inner), "
            "'squared' (the paper's penalty, a mean over matrices) or 'norm' (the "
            "released code's)"
        )
    if weight is not None:
        _checks.at_least("orthogonal_weight", weight)


def added(
    tree: Adapters, adapters: Mapping[str, AdaLora], form: str, weight: _checks.Number
) -> Adapters:
    """Returns gradients plus the penalty's, or updates plus the decoupled step.

    Args:
      tree: gradients for "squared" and "norm", updates for "decoupled".
      adapters: the AdaLora entries, before the update.
      form: one of `WEIGHTS`.
      weight: the weight; None for the form's default.
    """
    weight = WEIGHTS[form] if weight is None else weight
    if isinstance(weight, int | float) and weight == 0:
        return dict(tree)
    if form == "decoupled":
        step = functools.partial(_stepped, weight=weight)
    else:
        count = sum(a.lam.size // a.rank for a in adapters.values())
        step = functools.partial(_sloped, form=form, weight=weight / count)
    return {**tree, **{p: _both(step, tree[p], own) for p, own in adapters.items()}}


def _both(step: Any, tree: Any, own: AdaLora) -> AdaLora:
    """Applies `step(x, given)` to p and q, as columns `[*batch, k, rank]`."""
    (p, q), (given_p, given_q) = (_columns(adapter) for adapter in (own, tree))
    left, right = step(p, given_p), step(q, given_q).mT
    return dataclasses.replace(tree, p=_like(left, tree.p), q=_like(right, tree.q))


def _columns(adapter: AdaLora) -> tuple[jax.Array, jax.Array]:
    """P and the transpose of q."""
    p, q = pairs.matrices(adapter)
    return p, q.mT


def _like(new: jax.Array, old: jax.Array) -> jax.Array:
    return new.reshape(old.shape).astype(old.dtype)


def _sloped(
    x: jax.Array, gradient: jax.Array, form: str, weight: _checks.Number
) -> jax.Array:
    """The gradient plus the penalty's: two thin products where autodiff has three."""
    gram, distance = _away(x)
    if form == "squared":
        return gradient + linalg.dot(x, 4 * weight * gram)
    # at exact orthonormality the norm's gradient is taken as zero
    share = weight * gram / jnp.where(distance > 0, distance, 1)
    return gradient + linalg.dot(x, share)


def _stepped(x: jax.Array, update: jax.Array, weight: _checks.Number) -> jax.Array:
    """The update plus the decoupled step."""
    gram, distance = _away(x)
    size = _norm(x)  # where x is zero, its step is too
    share = jnp.minimum(weight * _norm(update) / jnp.where(size > 0, size, 1), NEWTON)
    return update - linalg.dot(x, 4 * share * gram / jnp.maximum(distance, 1))


def _away(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`x^T x - I` and its norm."""
    gram = linalg.dot(x.mT, x) - jnp.eye(x.shape[-1], dtype=x.dtype)
    return gram, _norm(gram)


def _norm(x: jax.Array) -> jax.Array:
    """The norm of every matrix, `[*batch, 1, 1]`."""
    return jnp.sqrt(jnp.sum(x**2, axis=(-2, -1), keepdims=True))
