"""A bound on singular values, enforced after every step.

    W <- W - max(sigma_1 - tau, 0) u_1 v_1^T          a leaf of a plain tree
    D = s a b,  sigma_i(D) <- min(sigma_i(D), tau)    an adapter, every i at once

For an adapter the decomposition is exact, so all singular values of D are clipped, each
factor taking an equal part of the change:

    k_i = 1 - sqrt(min(1, tau / sigma_i)),    a <- a - U k U^T a,    b <- b - b V k V^T

References:
  Su, kexue.fm 11729 (2026), "post clip".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorax import _checks, linalg
from lorax.kernels import Kernel
from lorax.optim import _pairs, _pairwise, _states, _trees, _whole
from lorax.types import PyTree


class ClipSpectralNormState(NamedTuple):
    """The state of the power iteration.

    Attributes:
      v: `{path: [n, out]}`, float32 unit vectors for the n matrices of each leaf;
        empty for target "delta".
    """

    v: dict[str, jax.Array]


def clip_spectral_norm(
    tau: _checks.Number,
    target: Literal["delta", "param"] = "delta",
    kernels: Mapping[str, Kernel] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Bounds the spectral norm of the parameters after the step.

    Put it last in the chain, after the learning rate: it reads `params + updates`.

    Args:
      tau: the bound, positive.
      target: "delta": the update `s a b` of Lora and Dora, exactly. "param": the leaves
        of a plain tree or Full adapters, by one warm-started power iteration per step,
        which clips one singular value at a time.
      kernels: as for `add_decayed_spectral_norm`.

    Returns:
      An optax transformation; `update` needs the parameters.

    Raises:
      ValueError: a bound that is not positive, an unknown target; at `init`, a tree of
        the wrong kind; at `update`, no parameters.

    Example:
      >>> params = {"w": jnp.diag(jnp.array([3.0, 1.0]))}
      >>> tx = optax.chain(optax.sgd(1.0), clip_spectral_norm(2.0, target="param"))
      >>> state = tx.init(params)
      >>> zero = jax.tree.map(jnp.zeros_like, params)
      >>> updates, state = tx.update(zero, state, params)
      >>> abs(optax.apply_updates(params, updates)["w"]).round(3)
      Array([[2., 0.],
             [0., 1.]], dtype=float32)
    """
    _checks.positive("tau", tau)
    _checks.one_of("target", target, ("delta", "param"))

    if target == "param":
        return _of_leaves(tau, kernels)

    def clipped(update: _pairs.Pair, own: _pairs.Pair) -> tuple[jax.Array, jax.Array]:
        return _clipped(update, own, tau)

    return _pairwise.stateless("clip_spectral_norm", clipped, ClipSpectralNormState({}))


def _of_leaves(
    tau: _checks.Number, kernels: Mapping[str, Kernel] | None
) -> optax.GradientTransformationExtraArgs:
    def init_fn(params: PyTree) -> ClipSpectralNormState:
        return ClipSpectralNormState(_whole.start(_whole.leaves(params, kernels)))

    def update_fn(
        updates: PyTree,
        state: ClipSpectralNormState,
        params: PyTree = None,
        **extra: Any,
    ) -> tuple[PyTree, ClipSpectralNormState]:
        del extra
        after = optax.apply_updates(_trees.require_params(params), updates)
        excess, v = _whole.leaf_excess(_whole.leaves(after, kernels), state.v, tau)
        new = _whole.changed(updates, excess, lambda u, x: (u - x).astype(u.dtype))
        return new, ClipSpectralNormState(v)

    return _states.transformation(init_fn, update_fn)


def _clipped(
    update: _pairs.Pair, own: _pairs.Pair, tau: _checks.Number
) -> tuple[jax.Array, jax.Array]:
    """The updates after which no singular value of `s a b` is above tau."""
    dot = linalg.dot
    a, b = own.a + update.a, own.b + update.b
    u, s, vt = linalg.low_rank_svd(a, b)
    s = jnp.abs(own.scale) * s[..., None]
    ratio = jnp.where(s > tau, tau / jnp.where(s > tau, s, 1), 1)
    k = 1 - jnp.sqrt(ratio)  # [n, rank, 1]
    a_less, b_less = dot(u, k * dot(u.mT, a)), dot(dot(b, vt.mT) * k.mT, vt)
    return update.a - a_less, update.b - b_less
