"""LoRA-RITE: Adam with matrix second moments, invariant to how the product is split.

With the polar decompositions `a = U_a R_a`, `b^T = U_b R_b`, the other factor's
magnitude is divided out of each factor's gradient, which leaves the kernel's gradient
in a basis,

    g_a = grad_a R_b^-1 = s G U_b,    g_b = grad_b^T R_a^-1 = s G^T U_a

and each has moments on the rank side. For a, with `P = U_b^T U_b,old` (b is analogous):

    V <- mean of P V P^T and g_a^T g_a / in,        rho <- mean of rho + lost and 0
    M <- mean of M P^T and g_a (V + rho I)^-1/2,    update_a = M R_b^-1

The means are Adam's, with bias correction. `lost` is the largest decrease of an
eigenvalue from V to P V P^T: the part of the second moment outside the new basis.

Another gauge `(a T, T^-1 b)`, with any invertible T, rotates the bases, and with them
g, V and M, and turns update_a into update_a T, so the product follows exactly the same
path. The released code differs from the paper in three ways. Its V is the mean above,
divided by the number of inputs, where the paper's is a sum (Adagrad); here it is as in
the code, so that M has entries of size 1. It leaves out rho by default; here rho is
used, as in the paper. It clips all g together at norm 1 and drops those with an entry
above 1 in the mean square; neither is done here, because V makes the step independent
of the gradient's size. Chain `optax.clip_by_global_norm` before it against outliers.

References:
  Yen et al., LoRA Done RITE: Robust Invariant Transformation Equilibration for LoRA
  Optimization, arXiv:2410.20625; gkevinyen5418/LoRA-RITE.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

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


class ScaleByLoraRiteState(NamedTuple):
    """The bases of the last step, and the moments in them.

    Attributes:
      count: updates so far, int32.
      basis: `{path: (a, b)}`, U_a and U_b^T, in the factors' shapes.
      momentum: `{path: (a, b)}`, M of a and b, in the factors' shapes.
      second: `{path: (a, b)}`, V of both, `[n, rank, rank]`.
      escaped: `{path: (a, b)}`, rho of both, `[n]`.
    """

    count: jax.Array  # type: ignore[assignment]
    basis: dict[str, Both]
    momentum: dict[str, Both]
    second: dict[str, Both]
    escaped: dict[str, Both]

    @property
    def reads_gradients(self) -> str:
        """The name of the transform, for the error message."""
        return "scale_by_lora_rite"


Kept = tuple[Both, Both, Both, Both]
"""The fields of the state, except the count, for one stack of pairs."""


class _Rates(NamedTuple):
    """Bias-corrected b1 and b2 for one step, and eps."""

    b1: jax.Array
    b2: jax.Array
    eps: _checks.Number


class _Moments(NamedTuple):
    """The moments of one factor, as a stack of tall matrices."""

    momentum: jax.Array  # [n, long, rank]
    second: jax.Array  # [n, rank, rank]
    escaped: jax.Array  # [n]


def scale_by_lora_rite(
    b1: _checks.Number = 0.9,
    b2: _checks.Number = 0.999,
    eps: _checks.Number = 1e-6,
    escape: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradients of every pair by LoRA-RITE's directions.

    While a factor is zero, the other gets no step, because its gradient is zero. Other
    leaves pass through.

    Args:
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added to the root of the second moment; 1e-6 as released.
      escape: False leaves out rho, as the released code does by default.

    Returns:
      An optax transformation; `update` needs the adapters, as `params`, and takes
      `pairs=` for a population member.

    Raises:
      ValueError: a hyperparameter out of range; at `init`, an AdaLora; at `update`, no
        adapters.

    Example:
      >>> from lorax.adapters import Lora
      >>> from lorax.types import Axes
      >>> w = {"w": Lora(jnp.eye(2), 4 * jnp.eye(2), 1.0, Axes((0,), (1,)))}
      >>> tx = scale_by_lora_rite()
      >>> updates, _ = tx.update(w, tx.init(w), w)
      >>> updates["w"].a.round(3)  # sqrt(in) polar(grad_a), divided by |b|
      Array([[0.354, 0.   ],
             [0.   , 0.354]], dtype=float32)
    """
    _standard.check_moments(b1, b2, eps)

    def init_fn(params: Adapters) -> ScaleByLoraRiteState:
        given = _trees.require_pairs(params, "scale_by_lora_rite")
        pairs = _trees.only_pairs(given)
        zeros = {path: _pairs.zeros(adapter) for path, adapter in pairs.items()}
        grams = {path: _gram.grams(_pairs.pair_of(a)) for path, a in pairs.items()}
        second = {path: Both(*both) for path, both in grams.items()}
        second = jax.tree.map(jnp.zeros_like, second)
        escaped = jax.tree.map(lambda v: v[:, 0, 0], second)
        count = jnp.zeros((), jnp.int32)
        return ScaleByLoraRiteState(count, zeros, zeros, second, escaped)

    def update_fn(
        updates: Adapters,
        state: ScaleByLoraRiteState,
        params: Adapters | None = None,
        *,
        pairs: Mapping[str, PairStatics] | None = None,
        **extra: Any,
    ) -> tuple[Adapters, ScaleByLoraRiteState]:
        del extra
        count = optax.safe_increment(state.count)

        def turned(update: _pairs.Pair, given: _pairs.Pair, kept: Kept) -> Any:
            now1, now2 = (_decay_now(b, count, given.a.dtype) for b in (b1, b2))
            rates = _Rates(now1, now2, eps)
            a, b, kept = _turned(update, given, kept, rates, escape)
            return *_gram.true_rank_only(a, b, given.rank), kept

        kept = state[1:]
        updates, parts = _pairwise.map_both(turned, updates, params, kept, pairs)
        return updates, ScaleByLoraRiteState(count, *parts)

    return _states.transformation(init_fn, update_fn)


def lora_rite(
    learning_rate: _checks.NumberOrSchedule,
    b1: _checks.Number = 0.9,
    b2: _checks.Number = 0.999,
    eps: _checks.Number = 1e-6,
    escape: bool = True,
    weight_decay: _checks.NumberOrSchedule = 0.0,
    full_decay: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """LoRA-RITE for the factors, Adam for every other leaf (magnitude, value).

    Args:
      learning_rate: a number or a schedule. The kernel's step does not depend on how
        the product is split into factors.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: see `scale_by_lora_rite`; also used by Adam.
      escape: see `scale_by_lora_rite`.
      weight_decay: see `add_decayed_weights`; it keeps the invariance.
      full_decay: True makes Full leaves decay to their initial values.

    Returns:
      An optax transformation; `update` needs the adapters, as `params`.

    Raises:
      ValueError: a hyperparameter out of range.

    Example:
      >>> tx = lora_rite(1e-3)
    """
    rest = functools.partial(_trees.factor_mask, others=True)
    return optax.chain(
        scale_by_lora_rite(b1, b2, eps, escape),
        optax.masked(_standard.adam(b1, b2, eps), rest),
        _decay.add_decayed_weights(weight_decay, full_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def _decay_now(beta: _checks.Number, count: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The weight of the old value in a bias-corrected mean of `count` values."""
    t = count.astype(dtype)
    return beta * (1 - beta ** (t - 1)) / (1 - beta**t)


def _turned(
    update: _pairs.Pair, given: _pairs.Pair, kept: Kept, rates: _Rates, escape: bool
) -> tuple[jax.Array, jax.Array, Kept]:
    """The new directions, and the state to keep: bases, momentum, V and rho of both."""
    bases, momentum, second, escaped = kept
    u_a, inverse_a = _polar.parts(given.a)
    u_b, inverse_b = _polar.parts(given.b.mT)
    of_a = _Moments(momentum.a, second.a, escaped.a)
    of_b = _Moments(momentum.b.mT, second.b, escaped.b)
    g_a, g_b = linalg.dot(update.a, inverse_b), linalg.dot(update.b.mT, inverse_a)
    of_a = _advanced(g_a, linalg.dot(u_b.mT, bases.b.mT), of_a, rates, escape)
    of_b = _advanced(g_b, linalg.dot(u_a.mT, bases.a), of_b, rates, escape)
    a = linalg.dot(of_a.momentum, inverse_b)
    b = linalg.dot(of_b.momentum, inverse_a).mT
    after = (
        Both(u_a, u_b.mT),
        Both(of_a.momentum, of_b.momentum.mT),
        Both(of_a.second, of_b.second),
        Both(of_a.escaped, of_b.escaped),
    )
    return a, b, after


def _advanced(
    g: jax.Array, p: jax.Array, old: _Moments, rates: _Rates, escape: bool
) -> _Moments:
    """The moments of one factor after its unmagnified gradient `[n, long, rank]`."""
    b1, b2, eps = rates
    moved = linalg.dot(p, linalg.dot(old.second, p.mT))
    lost = jnp.zeros_like(old.escaped)
    if escape:
        before, after = (_lapack.eigh(v)[0] for v in (old.second, moved))
        lost = jnp.max(jnp.maximum(before - after, 0), axis=-1)
    second = b2 * moved + (1 - b2) * linalg.dot(g.mT, g) / g.shape[1]
    escaped = b2 * (old.escaped + lost)
    direction = linalg.dot(g, _inverse_root(second, escaped[:, None], eps))
    momentum = b1 * linalg.dot(old.momentum, p.mT) + (1 - b1) * direction
    return _Moments(momentum, second, escaped)


def _inverse_root(v: jax.Array, escaped: jax.Array, eps: _checks.Number) -> jax.Array:
    """`(V + rho I)^-1/2`, with eps added to the roots."""
    values, vectors = _lapack.eigh((v + v.mT) / 2)
    # Eigenvalues below the largest one's rounding error are arbitrary, maybe zero.
    rounding = v.shape[-1] * jnp.finfo(v.dtype).eps * values[:, -1:]
    roots = jnp.sqrt(jnp.maximum(values, jnp.maximum(rounding, 0)) + escaped) + eps
    return linalg.dot(vectors / roots[:, None, :], vectors.mT)
