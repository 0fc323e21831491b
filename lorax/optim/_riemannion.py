"""Riemannion: Muon on the manifold of kernel updates of fixed rank.

A point is `D = s a b = U_a C U_b^T`, in orthonormal bases of its columns and rows. Its
tangent space consists of the matrices `A U_b^T + U_a B^T` with `U_a^T A = 0`, and P is
the projection onto it. With the gradient G of the kernel, a step is

    X <- beta P(X) + (1 - beta) P(G)      momentum, transported to the new point
    Z = P(polar(X))                       X has rank 2 r, so thin cores suffice
    D <- best rank-r part of (1 - lr decay) D - lr Z

so every step acts on D, however it is factored. P(G) needs only the factors' gradients:
`G U_b = grad_a R_b^-1 / s` and `G^T U_a = grad_b^T R_a^-1 / s` for the polar
decompositions `a = U_a R_a` and `b^T = U_b R_b`. `scale_by_riemannion` returns Z as
steps of the factors, `s (u_a b + a u_b) = Z`, and `retract`, the last in the chain,
turns any such steps into the best rank-r part, in the balanced factors nearest to the
old ones.

The momentum is X, as in Muon, not the orthogonalised Z. This was written from the
paper's abstract, a published summary of its equations and a reimplementation; the
paper's text and code were not available. The reimplementation keeps Z as momentum, and
decays a basis instead of D; both choices here follow Muon and weight decay of the
kernel. The paper's gradient-based initialisation is left to inits.

References:
  Bogachev et al., LoRA meets Riemannion: Muon Optimizer for Parametrization-independent
  Low-Rank Adapters, arXiv:2507.12142.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorax import _checks, _lapack, linalg
from lorax.adapters.pairs import Both
from lorax.optim import (
    _decay,
    _gram,
    _pairs,
    _pairwise,
    _polar,
    _standard,
    _states,
    _trees,
)
from lorax.types import Adapters, PairStatics

dot = linalg.dot


class ScaleByRiemannionState(NamedTuple):
    """The momentum, which is a tangent vector, and the point to which it belongs.

    Attributes:
      basis: `{path: (a, b)}`, U_a and U_b^T, in the factors' shapes.
      momentum: `{path: (a, b)}`, A and B^T, in the factors' shapes.
    """

    basis: dict[str, Both]
    momentum: dict[str, Both]

    @property
    def reads_gradients(self) -> str:
        """The name of the transform, for the error message."""
        return "scale_by_riemannion"


Kept = tuple[Both, Both]
"""The fields of the state, for one stack of pairs."""


class RetractState(NamedTuple):
    """Empty."""


class _Point(NamedTuple):
    """Orthonormal bases of columns and rows, `[n, in, rank]` and `[n, out, rank]`."""

    a: jax.Array
    b: jax.Array


def scale_by_riemannion(
    beta: _checks.Number = 0.9,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradients of every pair by the direction Z.

    Chain `retract` after the learning rate: without it, the step equals Z only to first
    order. While b is zero, as at init, only b gets a step. Other leaves pass through.

    Args:
      beta: decay rate of the momentum; 0.9 as in the reimplementation, Muon's own is
        0.95.

    Returns:
      An optax transformation; `update` needs the adapters, as `params`, and takes
      `pairs=` for a population member.

    Raises:
      ValueError: `beta` out of range; at `init`, an AdaLora; at `update`, no adapters.

    Example:
      >>> from lorax.adapters import Lora
      >>> from lorax.types import Axes
      >>> w = {"w": Lora(jnp.eye(2), 4 * jnp.eye(2), 1.0, Axes((0,), (1,)))}
      >>> tx = scale_by_riemannion()
      >>> updates, _ = tx.update(w, tx.init(w), w)
      >>> updates["w"].a @ w["w"].b + w["w"].a @ updates["w"].b  # the polar factor of G
      Array([[1., 0.],
             [0., 1.]], dtype=float32)
    """
    _checks.average("beta", beta)

    def init_fn(params: Adapters) -> ScaleByRiemannionState:
        given = _trees.require_pairs(params, "scale_by_riemannion")
        own = _trees.only_pairs(given)
        zeros = {path: _pairs.zeros(adapter) for path, adapter in own.items()}
        return ScaleByRiemannionState(zeros, zeros)

    def update_fn(
        updates: Adapters,
        state: ScaleByRiemannionState,
        params: Adapters | None = None,
        *,
        pairs: Mapping[str, PairStatics] | None = None,
        **extra: Any,
    ) -> tuple[Adapters, ScaleByRiemannionState]:
        del extra

        def turned(update: _pairs.Pair, given: _pairs.Pair, kept: Kept) -> Any:
            a, b, kept = _direction(update, given, kept, beta)
            return *_gram.true_rank_only(a, b, given.rank), kept

        updates, parts = _pairwise.map_both(turned, updates, params, state, pairs)
        return updates, ScaleByRiemannionState(*parts)

    return _states.transformation(init_fn, update_fn)


def retract() -> optax.GradientTransformationExtraArgs:
    """Turns the steps of a and b into a step to the best rank-r part of the new D.

    With steps u_a, u_b, it truncates `a b + u_a b + a u_b`, of rank 2 r, to its r
    largest singular values S, and takes the factors to `U S^1/2 Q` and `Q^T S^1/2 V^T`,
    with the rotation Q that keeps them nearest to the old ones. If the result has less
    than rank r, as at b = 0 with a learning rate of zero, balanced factors would lose a
    direction for good, so the factors take their own steps instead.

    Returns:
      An optax transformation without state; `update` needs the adapters, as `params`,
      and takes `pairs=` for a population member.

    Raises:
      ValueError: at `init`, an AdaLora; at `update`, no adapters.

    Example:
      >>> tx = optax.chain(optax.sgd(0.1), retract())
    """

    def nearest(update: _pairs.Pair, own: _pairs.Pair) -> tuple[jax.Array, jax.Array]:
        rank = own.a.shape[-1]
        rows = jnp.concatenate([own.a, update.a], axis=2)
        columns = jnp.concatenate([own.b + update.b, own.b], axis=1)
        u, s, vt = linalg.low_rank_svd(rows, columns)
        if s.shape[-1] < rank:  # a kernel with fewer inputs or outputs than that
            return update.a, update.b
        s = s[:, None, :rank]
        real = jnp.arange(rank)[None, None, :] < own.rank
        last = jnp.min(jnp.where(real, s, s[..., :1]), axis=-1, keepdims=True)
        full = last > _polar.THRESHOLD * s[..., :1]
        a, b = u[..., :rank] * jnp.sqrt(s), jnp.sqrt(s).mT * vt[:, :rank]
        a, b = _gram.true_rank_only(a, b, own.rank)
        q = _rotation(dot(a.mT, own.a) + dot(b, own.b.mT), own.rank)
        a, b = _gram.true_rank_only(dot(a, q), dot(q.mT, b), own.rank)
        a, b = (
            jnp.where(full, a - own.a, update.a),
            jnp.where(full, b - own.b, update.b),
        )
        return a, b

    return _pairwise.stateless("retract", nearest, RetractState())


def riemannion(
    learning_rate: _checks.NumberOrSchedule,
    beta: _checks.Number = 0.9,
    adam_learning_rate: _checks.NumberOrSchedule | None = None,
    b1: _checks.Number = 0.9,
    b2: _checks.Number = 0.999,
    eps: _checks.Number = 1e-8,
    weight_decay: _checks.NumberOrSchedule = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Riemannion for the factors, Adam for every other leaf (magnitude, value).

    Args:
      learning_rate: roughly the spectral norm of the kernel's step; a number or a
        schedule.
      beta: see `scale_by_riemannion`.
      adam_learning_rate: for the leaves trained by Adam; None for `learning_rate`.
      b1: Adam's decay rate of the first moment.
      b2: Adam's decay rate of the second moment.
      eps: Adam's epsilon.
      weight_decay: decoupled decay of the factors' product alone.

    Returns:
      An optax transformation; `update` needs the adapters, as `params`.

    Raises:
      ValueError: a hyperparameter out of range.

    Example:
      >>> tx = riemannion(0.02, adam_learning_rate=1e-3)
    """
    _checks.at_least("weight_decay", weight_decay, schedule=True)
    other = learning_rate if adam_learning_rate is None else adam_learning_rate
    rest = functools.partial(_trees.factor_mask, others=True)
    return optax.chain(
        scale_by_riemannion(beta),
        optax.masked(_standard.adam(b1, b2, eps), rest),
        _decay.add_decayed_weights(_half(weight_decay)),
        optax.masked(optax.scale_by_learning_rate(learning_rate), _trees.factor_mask),
        optax.masked(optax.scale_by_learning_rate(other), rest),
        retract(),
    )


def _half(weight_decay: _checks.NumberOrSchedule) -> _checks.NumberOrSchedule:
    """Half the decay for each factor: to first order, the product decays in full."""
    if callable(weight_decay):
        return lambda count: 0.5 * weight_decay(count)
    return 0.5 * weight_decay


def _direction(
    update: _pairs.Pair, given: _pairs.Pair, kept: Kept, beta: _checks.Number
) -> tuple[jax.Array, jax.Array, Kept]:
    """Z as steps of the factors, and the new point and momentum."""
    u_a, inverse_a = _polar.parts(given.a)
    u_b, inverse_b = _polar.parts(given.b.mT)
    point = _Point(u_a, u_b)
    old = _Point(kept[0].a, kept[0].b.mT), kept[1].a, kept[1].b.mT
    before = _projected(*_thin(*old), point)
    of_g = (
        _outside(point.a, dot(update.a, inverse_b) / given.scale),
        dot(update.b.mT, inverse_a) / given.scale,
    )
    a, b = (beta * x + (1 - beta) * g for x, g in zip(before, of_g, strict=True))
    left, right = _thin(point, a, b)
    u, vt = _polar.product(left, right.mT)
    z_a, z_b = _projected(u, vt.mT, point)
    kept = Both(u_a, u_b.mT), Both(a, b.mT)
    new_a, new_b = dot(z_a, inverse_b), dot(inverse_a, z_b.mT)
    return new_a / given.scale, new_b / given.scale, kept


def _thin(point: _Point, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`L = [A, U_a]` and `R = [U_b, B]`, whose `L R^T` is the tangent vector."""
    left = jnp.concatenate([a, point.a], axis=-1)
    return left, jnp.concatenate([point.b, b], axis=-1)


def _projected(
    left: jax.Array, right: jax.Array, point: _Point
) -> tuple[jax.Array, jax.Array]:
    """The A and B of `P(L R^T)`."""
    a = dot(left, dot(right.mT, point.b))
    return _outside(point.a, a), dot(right, dot(left.mT, point.a))


def _outside(basis: jax.Array, x: jax.Array) -> jax.Array:
    return x - dot(basis, dot(basis.mT, x))


def _rotation(x: jax.Array, rank: _pairs.Static) -> jax.Array:
    """The orthogonal matrix nearest to x, the identity on a population's padding."""
    own = jnp.eye(x.shape[-1], dtype=x.dtype)[None]
    padded = jnp.arange(x.shape[-1])[None, :, None] >= rank
    u, _, vt = _lapack.svd(x + jnp.where(padded, own, 0))
    return dot(u, vt)
