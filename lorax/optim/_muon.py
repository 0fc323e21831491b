"""Muon on the factors: the polar factor of the momentum, computed exactly.

    m <- beta m + (1 - beta) g,    u = (1 - beta) g + beta m          (Nesterov)
    update = sqrt(max(1, out / in)) polar(u),    polar(U S V^T) = U V^T

This is the published momentum, without bias correction. `optax.contrib.muon` corrects
it as NAdam does, which gives the momentum less weight in the first steps,

    u = (1 - beta) g + c_t beta m,    c_t = (1 - beta^t) / (1 - beta^(t+1))

(a common factor does not change the polar factor): at beta = 0.95, c_t is 0.51 in step
1, where both directions are that of g, 0.68 in step 2, 0.93 in step 10, and tends to 1.

A factor has one short side, so its polar factor can be computed exactly, by QR and a
decomposition of the rank x rank core, without Newton-Schulz steps. With this width
scale the update of b is sqrt(in / rank) times as large per entry as that of a, which
gives LoRA+'s ratio for free. Which factors are orthogonalised, and how:

    b          polar(u_b); a follows Adam (reports find Muon on a to be noise)
    both       polar(u_a), polar(u_b)
    whitened   polar(u_a M^-1/2) M^-1/2,  N^-1/2 polar(N^-1/2 u_b),  without a width
               scale; N = a^T a, M = b b^T. The kernel's step does not depend on how
               the product is split. Not the paper's step size: see split
    split      whitened / (2 s), as in LoRA-Muon: the learning rate bounds the spectral
               norm of the kernel's step, and the product decays (`split_decay`)
    product    the polar factor P of LoRA-Pro's projection of the kernel's gradient
               (rank 2r, from thin cores), projected back to the factors

"split" is steepest descent under the spectral norm. Let each part of the kernel's
first-order change, `X + Y = s u_a b + s a u_b`, have norm at most 1/2, so that the sum
has norm at most 1. `<G, X>` is largest if X is half the polar factor of G projected
onto the rows of b, and `u_a b = polar(u_a M^-1/2) M^-1/2 b` is that polar factor. So
`u_a = polar(m_a M^-1/2) M^-1/2 / (2 s)`, with `m_a` the gradient of a, and b is
analogous. A published summary of the paper has the same equations at s = 1, with
momentum on the factors' gradients and without Nesterov's look-ahead. The paper's
treatment of singular M and N was not available; here it is `damping`.

References:
  Jordan et al., Muon: An optimizer for hidden layers in neural networks (2024).
  Cesista et al., LoRA-Muon: Spectral Steepest Descent on the Low-Rank Manifold,
  arXiv:2606.12921.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorax import _checks, linalg
from lorax.optim import (
    _decay,
    _gram,
    _pairs,
    _pairwise,
    _polar,
    _projection,
    _split_decay,
    _standard,
    _states,
    _trees,
)
from lorax.types import Adapters, PairStatics

Factors = Literal["b", "both", "whitened", "split", "product"]
CHOICES = ("b", "both", "whitened", "split", "product")


class ScaleByMuonFactorsState(NamedTuple):
    """The momentum.

    Attributes:
      momentum: an adapter tree, at least float32; zero for leaves that are not
        orthogonalised.
    """

    momentum: Adapters


def scale_by_muon_factors(
    factors: Factors = "b",
    beta: _checks.Number = 0.95,
    nesterov: bool = True,
    damping: _checks.Number = 0.1,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradients of factors by orthogonalised momentum.

    Singular directions below 1e-6 of the largest get no step, and neither does a factor
    whose momentum is below 1e-6 of its partner's: while b is zero, the gradient of a is
    exactly zero, and rounding errors must not become a full step. Other leaves pass
    through.

    Args:
      factors: which factors, and how; see the module docstring. The published LoRA-Muon
        is "split"; "whitened" takes its direction with 2 s times its step, as the
        studies here use it.
      beta: decay rate of the momentum; 0.95 as published.
      nesterov: whether to look ahead, as published, without the bias correction of
        `optax.contrib.muon`; see the module docstring.
      damping: damping of the Gram matrices in "whitened", "split" and "product",
        relative to the larger trace; 0 for exact invariance, see `scale_by_lora_pro`.

    Returns:
      An optax transformation; `update` needs the adapters, as `params`.

    Raises:
      ValueError: an unknown choice, a hyperparameter out of range; at `init`, an
        AdaLora.
    """
    _checks.one_of("factors", factors, CHOICES)
    _checks.average("beta", beta)
    _checks.at_least("damping", damping)

    def init_fn(params: Adapters) -> ScaleByMuonFactorsState:
        given = _trees.require_pairs(params, "scale_by_muon_factors")
        return ScaleByMuonFactorsState(
            jax.tree.map(lambda x: jnp.zeros_like(x, linalg.wide(x.dtype)), given)
        )

    def update_fn(
        updates: Adapters,
        state: ScaleByMuonFactorsState,
        params: Adapters | None = None,
        *,
        pairs: Mapping[str, PairStatics] | None = None,
        **extra: Any,
    ) -> tuple[Adapters, ScaleByMuonFactorsState]:
        del extra
        handled = _trees.factor_mask(updates, _roles(factors))

        def mean(m: jax.Array, g: jax.Array, on: bool) -> jax.Array:
            return beta * m + (1 - beta) * g.astype(m.dtype) if on else m

        def look(m: jax.Array, g: jax.Array, on: bool) -> jax.Array:
            return g if not on else (1 - beta) * g + beta * m if nesterov else m

        momentum = jax.tree.map(mean, state.momentum, updates, handled)
        ahead = jax.tree.map(look, momentum, updates, handled)

        def turned(
            update: _pairs.Pair, own: _pairs.Pair
        ) -> tuple[jax.Array, jax.Array]:
            a, b = _turned(factors, update, own, damping)
            return _gram.true_rank_only(a, b, own.rank)

        new = _pairwise.map_pairs(turned, ahead, params, pairs)
        new = jax.tree.map(lambda n, u: n.astype(u.dtype), new, updates)
        return new, ScaleByMuonFactorsState(momentum)

    return _states.transformation(init_fn, update_fn)


def muon(
    learning_rate: _checks.NumberOrSchedule,
    factors: Factors = "b",
    beta: _checks.Number = 0.95,
    nesterov: bool = True,
    damping: _checks.Number = 0.1,
    adam_learning_rate: _checks.NumberOrSchedule | None = None,
    b1: _checks.Number = 0.9,
    b2: _checks.Number = 0.999,
    eps: _checks.Number = 1e-8,
    weight_decay: _checks.NumberOrSchedule = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Muon for the factors, Adam for other leaves (magnitude, value; a, too, in "b").

    Whole matrices (`Full`) also follow Adam; for Muon on those, use
    `optax.contrib.muon` with its `muon_weight_dimension_numbers`.

    Args:
      learning_rate: the rate of the orthogonalised factors; 0.02 is Muon's own default.
        With "split" it bounds the spectral norm of the kernel's step.
      factors: see `scale_by_muon_factors`; the published LoRA-Muon is "split". At the
        same learning rate, the step of "whitened" is 2 s times as large: four times
        with alpha = 2 rank.
      beta: see `scale_by_muon_factors`.
      nesterov: see `scale_by_muon_factors`.
      damping: see `scale_by_muon_factors`.
      adam_learning_rate: for the leaves trained by Adam; None for `learning_rate`.
      b1: Adam's decay rate of the first moment.
      b2: Adam's decay rate of the second moment.
      eps: Adam's epsilon.
      weight_decay: decoupled decay of the factors alone; in "split", of their product.

    Returns:
      An optax transformation; `update` needs the adapters, as `params`.

    Raises:
      ValueError: an unknown choice, a hyperparameter out of range.

    Example:
      >>> tx = muon(0.02, factors="b", adam_learning_rate=1e-3, weight_decay=0.01)
    """
    other = learning_rate if adam_learning_rate is None else adam_learning_rate
    roles = _roles(factors)
    turned = functools.partial(_trees.factor_mask, roles=roles)
    rest = functools.partial(_trees.factor_mask, roles=roles, others=True)
    links = [
        scale_by_muon_factors(factors, beta, nesterov, damping),
        optax.masked(_standard.adam(b1, b2, eps), rest),
        _decay.add_decayed_weights(weight_decay),
        optax.masked(optax.scale_by_learning_rate(learning_rate), turned),
        optax.masked(optax.scale_by_learning_rate(other), rest),
    ]
    if factors == "split":
        del links[2]
        links.append(_split_decay.split_decay(weight_decay, learning_rate))
    return optax.chain(*links)


def _roles(factors: str) -> tuple[str, ...]:
    """The roles of the leaves that are orthogonalised."""
    return ("b",) if factors == "b" else ("a", "b")


def _turned(
    factors: str, update: _pairs.Pair, own: _pairs.Pair, damping: _checks.Number
) -> tuple[jax.Array, jax.Array]:
    """The new directions of a and b, width scale included."""
    n, m = own.a.shape[1], own.b.shape[2]
    wide_a, wide_b = max(1.0, (own.a.shape[2] / n)) ** 0.5, _width(m, own.rank)
    a, b = _alive(update.a, update.b), _alive(update.b, update.a)
    if factors == "b":
        return update.a, wide_b * _polar.factor(b.mT).mT
    if factors == "both":
        return wide_a * _polar.factor(a), wide_b * _polar.factor(b.mT).mT
    if factors in ("whitened", "split"):
        left, right = _gram.spectra(own, damping)
        root_n, root_m = _inverse_root(left), _inverse_root(right)
        new_a = linalg.dot(_polar.factor(linalg.dot(a, root_m)), root_m)
        new_b = linalg.dot(root_n, _polar.factor(linalg.dot(root_n, b).mT).mT)
        budget = 1.0 if factors == "whitened" else 0.5 / own.scale
        return budget * new_a, budget * new_b
    ha, hb = _projection.project(
        _pairs.Pair(a, b, own.scale, own.rank),
        own,
        _projection.Solution("zero", damping),
    )
    s = own.scale
    rows = jnp.concatenate([ha, own.a], axis=2)  # [n, in, 2 rank]
    columns = jnp.concatenate([s * own.b, s * hb], axis=1)
    u, vt = _polar.product(rows, columns)
    whole = max(1.0, m / n) ** 0.5
    ga = s * linalg.dot(u, linalg.dot(vt, own.b.mT))
    gb = s * linalg.dot(linalg.dot(own.a.mT, u), vt)
    ha, hb = _projection.project(
        _pairs.Pair(ga, gb, own.scale, own.rank),
        own,
        _projection.Solution("sylvester", damping),
    )
    return whole * ha, whole * hb


def _width(out: int, rank: _pairs.Static) -> jax.Array:
    return jnp.sqrt(jnp.maximum(1.0, out / rank))


def _alive(own: jax.Array, other: jax.Array) -> jax.Array:
    """Zero if a factor's momentum is rounding error compared with its partner's."""
    size, beside = (
        jnp.linalg.norm(x, axis=(1, 2), keepdims=True) for x in (own, other)
    )
    return jnp.where(size > _polar.THRESHOLD * beside, own, 0)


def _inverse_root(spectrum: _gram.Spectrum) -> jax.Array:
    v = spectrum.vectors
    root = jnp.sqrt(_gram.reciprocal(spectrum.values))
    return linalg.dot(v * root[:, None, :], v.mT)
