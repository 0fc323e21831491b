"""Decay of the spectral norm: shrinks the largest singular value, and no other.

    u <- u + weight_decay * grad 0.5 |W|^2,      grad 0.5 |W|_2^2 = sigma_1 u_1 v_1^T

It is decoupled, before the learning rate: sigma_1 becomes (1 - lr * weight_decay)
sigma_1 and no other singular value moves. For a Schatten norm with exponent p,

    grad 0.5 |W|_Sp^2 = |sigma|_p^(2-p) U S^(p-1) V^T

so p = 2 is Frobenius decay, and a larger even p is a smooth substitute if sigma_1 is
repeated. For the update `D = s a b` it is exact and cheap. With `N = a^T a`,
`M = b b^T`, the root `h = N^1/2` and the leading eigenpair (l, q) of `h M h`, so that
l = |a b|_2^2,

    z = h q,   y = M z / sqrt(l),      grad_a = s^2 (a y) y^T,   grad_b = s^2 z (z^T b)

and for an even p, with k = p/2 - 1, from products of rank x rank matrices alone,

    grad_a = s^2 c a M (N M)^k,   grad_b = s^2 c (N M)^k N b,   c = |a b|_Sp^(2-p)

Any other p needs the singular value decomposition of a b, from QR and a rank x rank
core. These keep no state. The norm of a whole kernel comes from one warm-started power
iteration per step. Beware of similar names: "spectral weight decay" elsewhere means
decay of the nuclear norm.

References:
  Su, kexue.fm 10648 (2024) and 11729 (2026). Yoshida & Miyato, Spectral Norm
  Regularization for Improving the Generalizability of Deep Learning, arXiv:1705.10941.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorax import _checks, _lapack, linalg
from lorax.kernels import Kernel
from lorax.optim import _gram, _pairs, _pairwise, _states, _trees, _whole
from lorax.types import Adapters, PairStatics, PyTree

dot = linalg.dot
EVEN = (2, 4, 6, 8, 10, 12)  # exponents whose powers of r x r matrices stay in range
Target = Literal["delta", "factors", "merged", "param"]


class DecayedSpectralNormState(NamedTuple):
    """The state of the power iteration.

    Attributes:
      v: `{path: [n, out]}`, float32 unit vectors for the n matrices of each leaf;
        empty for exact targets.
    """

    v: dict[str, jax.Array]


def add_decayed_spectral_norm(
    weight_decay: _checks.NumberOrSchedule,
    target: Target = "delta",
    schatten: float | None = None,
    kernels: Mapping[str, Kernel] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds the gradient of `weight_decay * 0.5 |.|^2` to the updates.

    | target | norm of | for | state |
    |---|---|---|---|
    | delta | s a b | Lora, Dora | none |
    | factors | a and b separately | Lora, Dora | none |
    | merged | the kernel that `merge` returns | Lora, Dora, AdaLora | v |
    | param | the leaf | a plain tree, or Full | v |

    "merged" is not the default, because on its own it *grows* the adapter until it
    cancels the leading direction of the pretrained kernel. "factors" bounds "delta",
    since `0.5 (|a|^2 + |b|^2) >= |a b|`. Magnitudes never decay.

    Args:
      weight_decay: strength, as for AdamW; keep its product with the learning rate
        below 1. A number or a schedule; for a schedule, `optax.inject_hyperparams`
        keeps the count.
      target: which norm to decay.
      schatten: exponent of the Schatten norm, at least 1; None, the default, means
        infinity, the spectral norm. "merged" and "param" support only that. It shapes
        the program: under `optax.inject_hyperparams`, name it in `static_args`.
      kernels: from `lorax.discover`, for "param": it gives the axes of leaves with more
        than two dimensions. Two-dimensional leaves do not need it.

    Returns:
      An optax transformation; `update` needs the parameters, and with "merged" the
      extra argument `base=`, the tree that `lorax.init` returned.

    Raises:
      ValueError: an unknown target, an exponent below 1 or unsupported by the target, a
        negative strength; at `init`, a tree of the wrong kind; at `update`, no
        parameters or no base.

    Example:
      >>> from lorax.adapters import Lora
      >>> from lorax.types import Axes
      >>> b = jnp.diag(jnp.array([3.0, 1.0]))
      >>> w = {"w": Lora(jnp.eye(2), b, 1.0, Axes((0,), (1,)))}
      >>> tx = add_decayed_spectral_norm(0.1)
      >>> zero = jax.tree.map(jnp.zeros_like, w)
      >>> updates, _ = tx.update(zero, tx.init(w), w)
      >>> updates["w"].b  # 0.1 sigma_1 u_1 v_1^T
      Array([[0.3, 0. ],
             [0. , 0. ]], dtype=float32)
    """
    _checks.at_least("weight_decay", weight_decay, schedule=True)
    _checks.one_of("target", target, ("delta", "factors", "merged", "param"))
    schatten = _exponent(target, schatten)
    if callable(weight_decay):
        return _scheduled(weight_decay, target, schatten, kernels)
    if target == "param":
        return _of_leaves(weight_decay, kernels)
    if target == "merged":
        return _of_kernels(weight_decay)
    return _of_factors(weight_decay, target, schatten)


def _exponent(target: Target, schatten: float | None) -> float:
    """The exponent of the norm; ValueError if the target does not support it."""
    whole = target in ("merged", "param")
    if isinstance(schatten, jax.core.Tracer):
        raise ValueError(
            "schatten is traced, but it shapes the program: use "
            "optax.inject_hyperparams(..., static_args=('schatten',))"
        )
    schatten = math.inf if schatten is None else schatten
    if not schatten >= 1 or (whole and schatten != math.inf):
        raise ValueError(
            f"schatten={schatten} for target={target!r}; give an exponent >= 1"
            + (", here only infinity: power iteration finds sigma_1" if whole else "")
        )
    return schatten


def _scheduled(schedule: Any, *fixed: Any) -> optax.GradientTransformationExtraArgs:
    names = ("target", "schatten", "kernels")
    make = optax.inject_hyperparams(
        add_decayed_spectral_norm, static_args=names, hyperparam_dtype=jnp.float32
    )
    return optax.with_extra_args_support(make(schedule, *fixed))


def _of_factors(
    weight_decay: _checks.Number, target: Target, schatten: float
) -> optax.GradientTransformationExtraArgs:
    gradient = _delta if target == "delta" else _factors

    def pulled(update: _pairs.Pair, own: _pairs.Pair) -> tuple[jax.Array, jax.Array]:
        a, b = _gram.true_rank_only(*gradient(own, schatten), own.rank)
        return update.a + weight_decay * a, update.b + weight_decay * b

    return _pairwise.stateless(_named(target), pulled, DecayedSpectralNormState({}))


def _of_kernels(weight_decay: _checks.Number) -> optax.GradientTransformationExtraArgs:
    def init_fn(params: Adapters) -> DecayedSpectralNormState:
        name = _named("merged")
        _trees.require_whole(_trees.require_adapters(params, name), name)
        return DecayedSpectralNormState(_whole.start_merged(params))

    def update_fn(
        updates: Adapters,
        state: DecayedSpectralNormState,
        params: Adapters | None = None,
        *,
        base: PyTree = None,
        pairs: Mapping[str, PairStatics] | None = None,
        **extra: Any,
    ) -> tuple[Adapters, DecayedSpectralNormState]:
        del extra
        given = _trees.require_params(params)
        decay, v = _whole.merged_decay(given, base, pairs, state.v)
        add = functools.partial(_added, strength=weight_decay)
        return jax.tree.map(add, updates, decay), DecayedSpectralNormState(v)

    return _states.transformation(init_fn, update_fn)


def _of_leaves(
    weight_decay: _checks.Number, kernels: Mapping[str, Kernel] | None
) -> optax.GradientTransformationExtraArgs:
    def init_fn(params: PyTree) -> DecayedSpectralNormState:
        return DecayedSpectralNormState(_whole.start(_whole.leaves(params, kernels)))

    def update_fn(
        updates: PyTree,
        state: DecayedSpectralNormState,
        params: PyTree = None,
        **extra: Any,
    ) -> tuple[PyTree, DecayedSpectralNormState]:
        del extra
        given = _trees.require_params(params)
        found, v = _whole.leaf_decay(_whole.leaves(given, kernels), state.v)
        add = functools.partial(_added, strength=weight_decay)
        return _whole.changed(updates, found, add), DecayedSpectralNormState(v)

    return _states.transformation(init_fn, update_fn)


def _named(target: Target) -> str:
    return f"add_decayed_spectral_norm(target={target!r})"


def _added(u: jax.Array, d: jax.Array, strength: _checks.Number) -> jax.Array:
    return (u + strength * d).astype(u.dtype)


def weights(s: jax.Array, schatten: float) -> jax.Array:
    """Returns `|s|_p^(2-p) s^(p-1)` for descending singular values `[..., k]`."""
    if schatten == math.inf:
        return jnp.where(jnp.arange(s.shape[-1]) == 0, s, 0)
    first = s[..., :1]
    share = s / jnp.where(first > 0, first, 1)  # so that no power can overflow
    norm = jnp.sum(share**schatten, -1, keepdims=True) ** (1 / schatten)
    scale = jnp.where(first > 0, norm, 1) ** (2 - schatten) * first
    return jnp.where(first > 0, scale * share ** (schatten - 1), 0)


def _delta(pair: _pairs.Pair, schatten: float) -> tuple[jax.Array, jax.Array]:
    """The gradient of `0.5 |s a b|_Sp^2` with respect to a and b."""
    a, b, square = pair.a, pair.b, pair.scale**2
    if schatten == math.inf:
        y, z = _leading(*_gram.grams(pair))
        return square * dot(dot(a, y), y.mT), square * dot(z, dot(z.mT, b))
    if schatten in EVEN:
        left, right = _powers(schatten, *_gram.grams(pair))
        return square * dot(a, left), square * dot(right, b)
    u, s, vt = linalg.low_rank_svd(a, b)
    w = square * weights(s, schatten)[:, None, :]
    return dot(u * w, dot(vt, b.mT)), dot(dot(a.mT, u) * w, vt)


def _leading(n: jax.Array, m: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The module's y and z, `[n, rank, 1]`, from N and M `[n, rank, rank]`."""
    values, vectors = _lapack.eigh(n)
    roots = jnp.sqrt(jnp.maximum(values, 0))[:, None, :]
    h = dot(vectors * roots, vectors.mT)
    values, vectors = _lapack.eigh(dot(h, dot(m, h)))
    square = values[:, -1:, None]  # sigma_1^2 of a b
    z = dot(h, vectors[..., -1:])
    sigma = jnp.sqrt(jnp.where(square > 0, square, 1))
    return jnp.where(square > 0, dot(m, z) / sigma, 0), z


def _powers(p: float, n: jax.Array, m: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`c M X^(p/2-1)` and `c X^(p/2-1) N` for `X = N M / tr(N M)`, by products."""
    product = dot(n, m)
    size = _trace(product)  # |sigma|_2^2
    x = product / jnp.where(size > 0, size, 1)
    power = jnp.broadcast_to(jnp.eye(n.shape[-1], dtype=n.dtype), n.shape)
    for _ in range(int(p) // 2 - 1):
        power = dot(power, x)
    total = _trace(dot(power, x))
    c = jnp.where(total > 0, total, 1) ** ((2 - p) / p)
    return c * dot(m, power), c * dot(power, n)


def _trace(x: jax.Array) -> jax.Array:
    return jnp.trace(x, axis1=1, axis2=2)[:, None, None]


def _factors(pair: _pairs.Pair, schatten: float) -> tuple[jax.Array, jax.Array]:
    """The gradients of `0.5 |a|_Sp^2` and `0.5 |b|_Sp^2`."""
    a, b = _thin(pair.a, schatten), _thin(pair.b.mT, schatten)
    return a, b.mT


def _thin(x: jax.Array, schatten: float) -> jax.Array:
    """The gradient of `0.5 |x|_Sp^2` for `x: [n, long, rank]`."""
    if schatten < 2:  # small singular values matter, and a Gram matrix loses them
        unit = jnp.broadcast_to(jnp.eye(x.shape[-1]), (len(x), *x.shape[-1:] * 2))
        u, s, vt = linalg.low_rank_svd(x, unit)
        return dot(u * weights(s, schatten)[:, None, :], vt)
    values, v = _lapack.eigh(dot(x.mT, x))
    if schatten == math.inf:
        top = v[..., -1:]
        return dot(x, top) * top.mT
    s = jnp.sqrt(jnp.maximum(values, 0))[:, ::-1]
    share = weights(s, schatten) / jnp.where(s > 0, s, 1)
    return dot(x, dot(v[..., ::-1] * share[:, None, :], v.mT[:, ::-1]))
