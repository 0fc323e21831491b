"""Adam on LoRA-Pro's projected gradient, dense or without ever forming it.

The projection `g = s (hA B + A hB)` is a kernel-sized matrix of rank 2r,

    g = L R,    L = [hA, A],  R = s [B; hB]

"full" keeps Adam's moments of g. "rowcol" keeps the running means p, q of its squares
along rows and columns, both of which follow from r x r products,

    mean_j g_ij^2 = (L (R R^T) * L)_i / m,      v_ij = p_i q_j / mean(p)

(Adafactor's estimate), and `u = g / sqrt(v)` only rescales rows of L and columns of R.
Either way u enters in place of the gradient: `U_A = s u B^T`, `U_B = s A^T u` are
projected once more, so that the kernel's step is the projection of u.

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

from lorax import _checks, tree
from lorax.adapters import layout
from lorax.optim import (
    _gram,
    _pairs,
    _pairwise,
    _projection,
    _standard,
    _states,
    _trees,
)
from lorax.types import Adapters, PairStatics


class ScaleByRowColState(NamedTuple):
    """Running means of the projected gradient's squares.

    Attributes:
      step: updates so far, int32.
      rows: `{path: [*batch, *in]}`, means along the outputs.
      columns: `{path: [*batch, *out]}`, means along the inputs.
    """

    step: jax.Array
    rows: dict[str, jax.Array]
    columns: dict[str, jax.Array]


class ScaleByFullState(NamedTuple):
    """Adam's moments of the projected gradient.

    Attributes:
      step: updates so far, int32.
      mu: `{path: [n, in, out]}`, the first moment; n layers or experts.
      nu: `{path: [n, in, out]}`, the second.
    """

    step: jax.Array
    mu: dict[str, jax.Array]
    nu: dict[str, jax.Array]


def scale_by_lora_pro_rowcol(
    b2: _checks.Number = 0.999,
    eps: _checks.Number = 1e-8,
    x: str = "sylvester",
    damping: _checks.Number = 0.01,
    relative: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Divides the projected gradient by factored root mean squares, n + m numbers.

    Args:
      b2: decay rate of the means, corrected for their start at zero.
      eps: its square is added to the means.
      x: of the second projection, see `scale_by_lora_pro`, which comes before this.
      damping: of the second projection; give the first the same.
      relative: False: absolute damping.

    Returns:
      An optax transformation of the pairs; other leaves pass.

    Raises:
      ValueError: a hyperparameter out of range; at `init`, an AdaLora; at `update`, no
        adapters.

    Example:
      >>> from lorax import optim
      >>> first = optim.scale_by_lora_pro(damping=0.01)
      >>> tx = optax.chain(first, scale_by_lora_pro_rowcol(), optax.scale(-2e-5))
    """
    _standard.check_adam(0.0, b2, eps, 0.0)
    _checks.at_least("damping", damping)

    def init_fn(params: Adapters) -> ScaleByRowColState:
        given = _trees.require_pairs(params, "scale_by_lora_pro_rowcol")
        pairs = _trees.only_pairs(given)
        # Sums of zeros of the factors' own, so that they are sharded alike.
        rows = tree.map_adapters(lambda _, p: _pairs.zeros_like(p.a).sum(-1), pairs)
        columns = tree.map_adapters(
            lambda _, p: _pairs.zeros_like(p.b).sum(layout.stack_axes(p.a, p.axes)),
            pairs,
        )
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
        step = optax.safe_increment(state.step)

        def scaled(h: _pairs.Pair, given: _pairs.Pair, means: Any) -> Any:
            left, right = _thin(h, given)
            means = jax.tree.map(
                lambda old, new: b2 * old + (1 - b2) * new.astype(old.dtype),
                means,
                _squares(left, right),
            )
            p, q = (
                mean / (1 - b2 ** step.astype(mean.dtype)) + eps**2 for mean in means
            )
            left *= jnp.sqrt(p.mean(-1, keepdims=True) / p)[..., None]
            right *= (1 / jnp.sqrt(q))[..., None, :]
            a = _gram.dot(left, _gram.dot(right, given.b.mT))
            b = _gram.dot(_gram.dot(given.a.mT, left), right)
            return *_again(a, b, given, x, damping, relative), means

        before = {path: (state.rows[path], state.columns[path]) for path in state.rows}
        depth = {path: _pairs.pair_of(updates[path]).a.shape[0] for path in before}
        flat = {
            path: tuple(x.reshape(depth[path], -1) for x in means)
            for path, means in before.items()
        }
        updates, after = _pairwise.map_kept(scaled, updates, params, flat, pairs)
        after = jax.tree.map(lambda new, old: new.reshape(old.shape), after, before)
        rows = {path: row for path, (row, _) in after.items()}
        columns = {path: column for path, (_, column) in after.items()}
        return updates, ScaleByRowColState(step, rows, columns)

    return _states.transformation(init_fn, update_fn)


def scale_by_lora_pro_full(
    b1: _checks.Number = 0.9,
    b2: _checks.Number = 0.999,
    eps: _checks.Number = 1e-8,
    x: str = "sylvester",
    damping: _checks.Number = 0.01,
    relative: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Adam on the projected gradient itself, as in the paper: state of 2 n m numbers.

    Args:
      b1: decay rate of the first moment.
      b2: decay rate of the second.
      eps: added to the root of the second moment.
      x: of the second projection, see `scale_by_lora_pro`, which comes before this.
      damping: of the second projection; give the first the same.
      relative: False: absolute damping.

    Returns:
      An optax transformation of the pairs; other leaves pass.

    Raises:
      ValueError: a hyperparameter out of range; at `init`, an AdaLora; at `update`, no
        adapters.

    Example:
      >>> from lorax import optim
      >>> first = optim.scale_by_lora_pro(damping=0.01)
      >>> tx = optax.chain(first, scale_by_lora_pro_full(), optax.scale(-2e-5))
    """
    _standard.check_adam(b1, b2, eps, 0.0)
    _checks.at_least("damping", damping)
    adam = _standard.standard(optax.scale_by_adam(b1, b2, eps))

    def init_fn(params: Adapters) -> ScaleByFullState:
        given = _trees.require_pairs(params, "scale_by_lora_pro_full")
        pairs = _trees.only_pairs(given)
        factors = {path: _pairs.pair_of(adapter)[:2] for path, adapter in pairs.items()}
        zeros = {
            path: _gram.dot(*map(_pairs.zeros_like, both))
            for path, both in factors.items()
        }
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
            return h.a, h.b, _gram.dot(*_thin(h, given))

        def step(h: _pairs.Pair, given: _pairs.Pair, u: jax.Array) -> Any:
            a = _gram.dot(u, given.b.mT)
            b = _gram.dot(given.a.mT, u)
            return *_again(a, b, given, x, damping, relative), None

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
    x: str,
    damping: _checks.Number,
    relative: bool,
    b1: _checks.Number | None,
    b2: _checks.Number,
    eps: _checks.Number,
) -> optax.GradientTransformation:
    """Returns the link that each mode of `lora_pro` puts after the projection."""
    adam = _standard.standard(optax.scale_by_adam(0.9 if b1 is None else b1, b2, eps))
    if mode == "factor":
        return adam
    if mode == "sgd":
        return optax.identity()
    rest = optax.masked(adam, functools.partial(_trees.factor_mask, others=True))
    if mode == "full":
        first = 0.9 if b1 is None else b1
        return optax.chain(
            scale_by_lora_pro_full(first, b2, eps, x, damping, relative), rest
        )
    links = [scale_by_lora_pro_rowcol(b2, eps, x, damping, relative), rest]
    if b1 is not None:
        momentum = _standard.standard(optax.ema(b1))
        links.append(optax.masked(momentum, _trees.factor_mask))
    return optax.chain(*links)


def _thin(h: _pairs.Pair, given: _pairs.Pair) -> tuple[jax.Array, jax.Array]:
    """L and R, `[n, in, 2 rank]` and `[n, 2 rank, out]`, of the projected gradient."""
    left = jnp.concatenate([h.a, given.a], axis=-1)
    return left, given.scale * jnp.concatenate([given.b, h.b], axis=-2)


def _squares(left: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Means of the squares of L R along its rows `[n, in]` and columns `[n, out]`."""
    dot = _gram.dot
    rows = jnp.sum(dot(left, dot(right, right.mT)) * left, axis=-1) / right.shape[-1]
    columns = jnp.sum(dot(dot(left.mT, left), right) * right, axis=-2) / left.shape[-2]
    return jnp.maximum(rows, 0), jnp.maximum(columns, 0)


def _again(
    a: jax.Array,
    b: jax.Array,
    given: _pairs.Pair,
    x: str,
    damping: Any,
    relative: bool,
) -> tuple[jax.Array, jax.Array]:
    """The step whose product is the projection of u, from `u B^T` and `A^T u`."""
    u = _pairs.Pair(given.scale * a, given.scale * b, given.scale, given.rank)
    return _projection.project(u, given, x, damping, relative)
