"""Adam on LoRA-Pro's projected gradient, dense or without forming it.

The projection `g = s (hA B + A hB)` is a kernel-sized matrix of rank 2r,

    g = L R,    L = [hA, A],  R = s [B; hB]

"full" keeps Adam's moments of g. "rowcol" keeps running means p, q of its squares along
rows and columns, which need only r x r products,

    mean_j g_ij^2 = (L (R R^T) * L)_i / m,      v_ij = p_i q_j / mean(p)

(Adafactor's estimate), and `u = g / sqrt(v)` only rescales rows of L and columns of R.
Either way u replaces the gradient: `U_A = s u B^T`, `U_B = s A^T u` are projected once
more, so the kernel's step is the projection of u.

References:
  Wang et al., LoRA-Pro: Are Low-Rank Adapters Properly Optimized?, arXiv:2407.18242.
  Shazeer & Stern, Adafactor, arXiv:1804.04235.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorax import _checks, linalg
from lorax.adapters import layout
from lorax.optim import (
    _pairs,
    _pairwise,
    _projection,
    _standard,
    _states,
    _trees,
)
from lorax.types import Adapters, PairStatics

Means = tuple[jax.Array, jax.Array]
"""Means of squares along rows, and along columns."""


class ScaleByRowColState(NamedTuple):
    """Running means of the projected gradient's squares.

    Attributes:
      count: updates so far, int32.
      rows: `{path: [*batch, *in]}`, means along the outputs.
      columns: `{path: [*batch, *out]}`, means along the inputs.
    """

    count: jax.Array  # type: ignore[assignment]
    rows: dict[str, jax.Array]
    columns: dict[str, jax.Array]


class ScaleByFullState(NamedTuple):
    """Adam's moments of the projected gradient.

    Attributes:
      count: updates so far, int32.
      mu: `{path: [n, in, out]}`, the first moment; n layers or experts.
      nu: `{path: [n, in, out]}`, the second moment.
    """

    count: jax.Array  # type: ignore[assignment]
    mu: dict[str, jax.Array]
    nu: dict[str, jax.Array]


def scale_by_lora_pro_rowcol(
    b2: _checks.Number = 0.999,
    eps: _checks.Number = 1e-8,
    x: str = "sylvester",
    damping: _checks.Number = 0.01,
    relative: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Divides the projected gradient by factored root mean squares (n + m numbers).

    Chain it after `scale_by_lora_pro`, which is the first projection.

    Args:
      b2: decay rate of the means, which are bias-corrected.
      eps: its square is added to the means.
      x: X for the second projection, see `scale_by_lora_pro`.
      damping: damping of the second projection; use the same for the first.
      relative: False for absolute damping.

    Returns:
      An optax transformation of the pairs; other leaves pass through.

    Raises:
      ValueError: a hyperparameter out of range; at `init`, an AdaLora; at `update`, no
        adapters.

    Example:
      >>> from lorax import optim
      >>> first = optim.scale_by_lora_pro(damping=0.01)
      >>> tx = optax.chain(first, scale_by_lora_pro_rowcol(), optax.scale(-2e-5))
    """
    return _rowcol(b2, eps, _projection.Solution(x, damping, relative).checked())


def _rowcol(
    b2: _checks.Number, eps: _checks.Number, solution: _projection.Solution
) -> optax.GradientTransformationExtraArgs:
    _checks.average("b2", b2)
    _checks.positive("eps", eps)

    def init_fn(params: Adapters) -> ScaleByRowColState:
        given = _trees.require_pairs(params, "scale_by_lora_pro_rowcol")
        rows, columns = {}, {}
        for path, pair in _trees.only_pairs(given).items():
            # Sums of zeros like the factors, so that they are sharded like them.
            zeros, behind = _pairs.zeros(pair), layout.stack_axes(pair.a, pair.axes)
            rows[path], columns[path] = zeros.a.sum(-1), zeros.b.sum(behind)
        return ScaleByRowColState(jnp.zeros((), jnp.int32), rows, columns)

    def update_fn(
        updates: Adapters,
        state: ScaleByRowColState,
        params: Adapters | None = None,
        *,
        pairs: Mapping[str, PairStatics] | None = None,
        **extra: Any,
    ) -> tuple[Adapters, ScaleByRowColState]:
        del extra
        count = optax.safe_increment(state.count)

        def scaled(h: _pairs.Pair, given: _pairs.Pair, means: Means) -> Any:
            left, right = _thin(h, given)
            means = _averaged(means, _squares(left, right), b2)
            p, q = (
                mean / (1 - b2 ** count.astype(mean.dtype)) + eps**2 for mean in means
            )
            a, b = _rescaled(left, right, given, p, q)
            return *_again(a, b, given, solution), means

        before = _of_matrices(state, updates)
        updates, after = _pairwise.map_kept(scaled, updates, params, before, pairs)
        rows = {p: after[p][0].reshape(x.shape) for p, x in state.rows.items()}
        columns = {p: after[p][1].reshape(x.shape) for p, x in state.columns.items()}
        return updates, ScaleByRowColState(count, rows, columns)

    return _states.transformation(init_fn, update_fn)


def scale_by_lora_pro_full(
    b1: _checks.Number = 0.9,
    b2: _checks.Number = 0.999,
    eps: _checks.Number = 1e-8,
    x: str = "sylvester",
    damping: _checks.Number = 0.01,
    relative: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Applies Adam to the projected gradient, as in the paper (2 n m numbers of state).

    Chain it after `scale_by_lora_pro`, which is the first projection.

    Args:
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added to the root of the second moment.
      x: X for the second projection, see `scale_by_lora_pro`.
      damping: damping of the second projection; use the same for the first.
      relative: False for absolute damping.

    Returns:
      An optax transformation of the pairs; other leaves pass through.

    Raises:
      ValueError: a hyperparameter out of range; at `init`, an AdaLora; at `update`, no
        adapters.

    Example:
      >>> from lorax import optim
      >>> first = optim.scale_by_lora_pro(damping=0.01)
      >>> tx = optax.chain(first, scale_by_lora_pro_full(), optax.scale(-2e-5))
    """
    return _full(b1, b2, eps, _projection.Solution(x, damping, relative).checked())


def _full(
    b1: _checks.Number,
    b2: _checks.Number,
    eps: _checks.Number,
    solution: _projection.Solution,
) -> optax.GradientTransformationExtraArgs:
    adam = _standard.adam(b1, b2, eps)

    def init_fn(params: Adapters) -> ScaleByFullState:
        given = _trees.require_pairs(params, "scale_by_lora_pro_full")
        zeros = {}
        for path, adapter in _trees.only_pairs(given).items():
            a, b, *_ = _pairs.pair_of(adapter)
            zeros[path] = linalg.dot(_pairs.zeros_like(a), _pairs.zeros_like(b))
        return ScaleByFullState(*adam.init(zeros))

    def update_fn(
        updates: Adapters,
        state: ScaleByFullState,
        params: Adapters | None = None,
        *,
        pairs: Mapping[str, PairStatics] | None = None,
        **extra: Any,
    ) -> tuple[Adapters, ScaleByFullState]:
        del extra

        def gather(h: _pairs.Pair, given: _pairs.Pair, _: None) -> Any:
            return h.a, h.b, linalg.dot(*_thin(h, given))

        def step(h: _pairs.Pair, given: _pairs.Pair, u: jax.Array) -> Any:
            a = linalg.dot(u, given.b.mT)
            b = linalg.dot(given.a.mT, u)
            return *_again(a, b, given, solution), None

        every = functools.partial(
            _pairwise.map_kept, adapters=params, pairs=pairs, stacked=False
        )
        _, dense = every(gather, updates, kept={})
        scaled, inner = adam.update(dense, optax.ScaleByAdamState(*state))
        updates, _ = every(step, updates, kept=scaled)
        return updates, ScaleByFullState(*inner)

    return _states.transformation(init_fn, update_fn)


def moments(
    mode: str,
    solution: _projection.Solution,
    b1: _checks.Number | None,
    b2: _checks.Number,
    eps: _checks.Number,
) -> optax.GradientTransformation:
    """Returns the transformation that `lora_pro` chains after the projection."""
    first = 0.9 if b1 is None else b1
    adam = _standard.adam(first, b2, eps)
    if mode == "factor":
        return adam
    if mode == "sgd":
        return optax.identity()
    rest = optax.masked(adam, functools.partial(_trees.factor_mask, others=True))
    if mode == "full":
        return optax.chain(_full(first, b2, eps, solution), rest)
    links = [_rowcol(b2, eps, solution), rest]
    if b1 is not None:
        momentum = _standard.standard(optax.ema(b1))
        links.append(optax.masked(momentum, _trees.factor_mask))
    return optax.chain(*links)


def _thin(h: _pairs.Pair, given: _pairs.Pair) -> tuple[jax.Array, jax.Array]:
    """The projected gradient's L and R, `[n, in, 2 rank]` and `[n, 2 rank, out]`."""
    left = jnp.concatenate([h.a, given.a], axis=-1)
    return left, given.scale * jnp.concatenate([given.b, h.b], axis=-2)


def _squares(left: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Means of the squares of L R along its rows `[n, in]` and columns `[n, out]`."""
    dot = linalg.dot
    rows = jnp.sum(dot(left, dot(right, right.mT)) * left, axis=-1) / right.shape[-1]
    columns = jnp.sum(dot(dot(left.mT, left), right) * right, axis=-2) / left.shape[-2]
    return jnp.maximum(rows, 0), jnp.maximum(columns, 0)


def _of_matrices(state: ScaleByRowColState, updates: Adapters) -> dict[str, Means]:
    """The means of every pair as `[n, in]` and `[n, out]`."""
    found = {}
    for path, rows in state.rows.items():
        n = _pairs.pair_of(updates[path]).a.shape[0]
        found[path] = rows.reshape(n, -1), state.columns[path].reshape(n, -1)
    return found


def _rescaled(
    left: jax.Array, right: jax.Array, given: _pairs.Pair, p: jax.Array, q: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`u B^T` and `A^T u` for `u = L R / sqrt(p q^T / mean(p))`, without forming u."""
    left *= jnp.sqrt(p.mean(-1, keepdims=True) / p)[..., None]
    right *= (1 / jnp.sqrt(q))[..., None, :]
    a = linalg.dot(left, linalg.dot(right, given.b.mT))
    return a, linalg.dot(linalg.dot(given.a.mT, left), right)


def _averaged(old: Means, new: Means, b2: _checks.Number) -> Means:
    """The running means, with weight 1 - b2 on the newest values."""
    rows, columns = (
        b2 * was + (1 - b2) * now.astype(was.dtype)
        for was, now in zip(old, new, strict=True)
    )
    return rows, columns


def _again(
    a: jax.Array, b: jax.Array, given: _pairs.Pair, solution: _projection.Solution
) -> tuple[jax.Array, jax.Array]:
    """The step whose product is the projection of u, from `u B^T` and `A^T u`."""
    u = _pairs.Pair(given.scale * a, given.scale * b, given.scale, given.rank)
    return _projection.project(u, given, solution)
