"""AdaLoRA: a total rank that moves to the triplets where the loss feels it most.

With update `scale * p diag(lam) q` and, for every element w of p, lam, q, its gradient
d (with the penalty's, where it has one),

    I = |w d|,    Ibar <- b1 Ibar + (1 - b1) I,    Ubar <- b2 Ubar + (1 - b2) |I - Ibar|
    s = Ibar Ubar,    S_i = s(lam_i) + mean_j s(p_ji) + mean_j s(q_ij)

every `interval` updates the b(t) triplets of largest S, over all matrices at once, are
chosen and lam of the others lands on zero. p and q, and between two choices lam too, go
on training, so a pruned triplet can come back: the interval gives it the chance. After
T - t_f importance is frozen (in the released code one update earlier) and the last
choice holds at every update.

References:
  Zhang et al., AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient
  Fine-Tuning, arXiv:2303.10512; github.com/QingruZhang/AdaLoRA.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lorax import _checks, linalg
from lorax.adapters import AdaLora, layout
from lorax.optim import _orthogonal, _states, _trees
from lorax.optim._adalora_schedule import BudgetSchedule, require_int
from lorax.types import Adapters


class AdaLoraState(NamedTuple):
    """What the next update needs; the trees hold the AdaLora paths alone.

    Attributes:
      count: int32 []; updates made.
      budget: int32 []; b(count), the total rank that the schedule allows.
      sensitivity: Ibar, `{path: AdaLora}` in the shapes of the adapters, float32.
      uncertainty: Ubar, likewise.
      mask: `{path: bool [*batch, rank]}`; False for triplets that the last choice left
        out.
      inner: of the wrapped transformation.
    """

    count: jax.Array  # type: ignore[assignment]
    budget: jax.Array
    sensitivity: Adapters
    uncertainty: Adapters
    mask: dict[str, jax.Array]
    inner: optax.OptState


def adalora(
    inner: optax.GradientTransformation,
    *,
    init_budget: int | None = None,
    target_budget: int,
    total_steps: int,
    initial_warmup: int,
    final_steps: int,
    interval: int | None = None,
    beta1: float | jax.Array = 0.85,
    beta2: float | jax.Array = 0.85,
    orthogonal_form: Literal["decoupled", "squared", "norm"] = "decoupled",
    orthogonal_weight: float | jax.Array | None = None,
    importance: Literal["post", "pre"] = "post",
) -> optax.GradientTransformationExtraArgs:
    """Trains AdaLora adapters by `inner` and allocates their total rank.

    A wrapper, because it needs the final updates: put clipping, schedules and decay in
    `inner`, and nothing behind it but `optax.MultiSteps` around it. Adapters other than
    AdaLora go through `inner` unchanged.

    The count is the only thing the program branches on. To train a population under
    `jax.vmap` leave it unbatched, and a step that chooses nothing sorts nothing there
    either: `in_axes` and `out_axes` of the state
    `AdaLoraState(None, None, 0, 0, 0, 0)`. With a batched count the result is the same
    and every member sorts at every step. `pairs=` passes unread: the members of a
    population must be of one rank, which `lorax.population` asks of AdaLora.

    Args:
      inner: the optimiser, such as `optax.adamw(1e-3, mask=decay_mask)`.
      init_budget: b0, the sum of the ranks, which is checked; None takes it from the
        adapters. Every layer of a stack is a matrix of its own.
      target_budget: bT, total rank at the end; the paper's average rank times the
        number of matrices. Published runs start from 1.5 bT.
      total_steps: T, calls of update that are made; a skipped one does not count.
      initial_warmup: t_i, updates before the budget falls.
      final_steps: t_f, updates at the end with the choice fixed.
      interval: updates between two choices; None for max(10, total_steps // 200). At
        PEFT's 1 a pruned triplet has next to no chance to come back.
      beta1: of Ibar; 0.85 as published.
      beta2: of Ubar; 0.85 as published.
      orthogonal_form: how p and q are pulled to orthonormality: "decoupled", a step of
        each matrix after `inner` that its moments and the importance do not see;
        "squared" or "norm", the gradient of `lorax.adapters.orthogonal_penalty` before
        both (the released code has "norm"). Do not add a penalty to the loss as well.
      orthogonal_weight: of it; None for 0.3, 0.001 or 0.1 in the order of the forms.
        Decoupled it multiplies the share of p that `inner` moves, and so follows the
        learning rate. The paper's 0.1 is of a sum of squares: M times "squared".
      importance: w of |w d|: "post", after the update, as released; "pre", before it,
        as in the paper's Algorithm 1.

    Returns:
      The transformation; its update needs the adapters.

    Raises:
      ValueError: numbers out of range; in `init`, a tree without AdaLora or another sum
        of ranks than `init_budget`.
      TypeError: `inner` is no optax transformation.

    Example:
      >>> from lorax.types import Axes
      >>> lora = AdaLora(jnp.eye(3, 2), jnp.ones(2), jnp.eye(2), 1.0, Axes((0,), (1,)))
      >>> tx = adalora(
      ...     optax.sgd(0.5), target_budget=1, total_steps=2, initial_warmup=0,
      ...     final_steps=1, orthogonal_weight=0.0)
      >>> adapters = {"w": lora}
      >>> grads = {"w": jax.tree.map(jnp.zeros_like, lora).replace(
      ...     lam=jnp.array([0.1, 0.4]))}
      >>> updates, state = tx.update(grads, tx.init(adapters), adapters)
      >>> optax.apply_updates(adapters, updates)["w"].lam
      Array([0. , 0.8], dtype=float32)
      >>> state.mask["w"], int(state.budget)
      (Array([False,  True], dtype=bool), 1)
    """
    inner = _wrapped(inner)
    schedule = BudgetSchedule(
        target_budget, total_steps, initial_warmup, final_steps, interval
    )
    _check(init_budget, target_budget, beta1, beta2, importance)
    _orthogonal.check(orthogonal_form, orthogonal_weight)
    orthogonal = functools.partial(
        _orthogonal.added, form=orthogonal_form, weight=orthogonal_weight
    )
    decoupled = orthogonal_form == "decoupled"

    def init_fn(params: Adapters) -> AdaLoraState:
        adapters = _trees.require_adapters(params, "adalora")
        _trees.require_whole(adapters, "adalora")
        total = _total(adapters, init_budget, target_budget)
        return _started(_chosen(adapters), total, inner.init(params))

    def update_fn(
        updates: Adapters, state: AdaLoraState, params: Any = None, **extra: Any
    ) -> tuple[Adapters, AdaLoraState]:
        adapters = _trees.require_params(params)
        total = _total(adapters, init_budget, target_budget)
        before = _chosen(adapters)
        grads = updates if decoupled else orthogonal(updates, before)
        updates, inner_state = inner.update(grads, state.inner, adapters, **extra)
        updates = orthogonal(updates, before) if decoupled else updates
        after = optax.apply_updates(before, _chosen(updates))

        count = optax.safe_increment(state.count)
        frozen, now = count > schedule.last, schedule.chooses_at(count)
        weights = after if importance == "post" else before
        means = _importance(weights, _chosen(grads), state, (beta1, beta2), frozen)
        budget = schedule.budget_at(total, count)
        mask = jax.lax.cond(
            now, lambda: _choose(*means, budget), lambda: dict(state.mask)
        )
        updates = _landing(updates, before, mask, free=~(now | frozen))
        return updates, AdaLoraState(count, budget, *means, mask, inner_state)

    return _states.transformation(init_fn, update_fn)


def _started(
    adapters: Mapping[str, AdaLora], total: int, inner: optax.OptState
) -> AdaLoraState:
    zeros: Any = jax.tree.map(
        lambda leaf: jnp.zeros_like(leaf, layout.wide(leaf)), dict(adapters)
    )
    return AdaLoraState(
        count=jnp.zeros((), jnp.int32),
        budget=jnp.full((), total, jnp.int32),
        sensitivity=zeros,
        uncertainty=jax.tree.map(jnp.copy, zeros),  # donated apart from the first
        mask={path: jnp.ones_like(a.lam, bool) for path, a in zeros.items()},
        inner=inner,
    )


def _wrapped(inner: Any) -> optax.GradientTransformationExtraArgs:
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            "inner must be an optax transformation, such as optax.adam(1e-3); got "
            f"{inner!r}. MultiSteps goes around: optax.MultiSteps(adalora(...), k)"
        )
    return optax.with_extra_args_support(inner)


def _check(
    init_budget: int | None,
    target_budget: int,
    beta1: _checks.Number,
    beta2: _checks.Number,
    importance: str,
) -> None:
    """Raises ValueError for what can be seen before the adapters are known."""
    if init_budget is not None:
        require_int("init_budget", init_budget, 1)
        _require_room(init_budget, target_budget)
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        _checks.number(name, beta)
        if not _traced(beta) and not 0 < beta < 1:
            raise ValueError(f"{name}={beta}; give a decay between 0 and 1")
    if importance not in ("post", "pre"):
        raise ValueError(
            f"importance={importance!r}; choose 'post' (weights after the update, as "
            "released) or 'pre' (before it, as in the paper)"
        )


def _traced(value: Any) -> bool:
    return isinstance(value, jax.core.Tracer)


def _require_room(init_budget: int, target_budget: int) -> None:
    if target_budget > init_budget:
        raise ValueError(
            f"target_budget={target_budget} is above the initial budget {init_budget}; "
            "both are total ranks over all AdaLora matrices: lower it, or start from a "
            "larger rank"
        )


def _chosen(adapters: Mapping[str, Any]) -> dict[str, AdaLora]:
    """The AdaLora entries, by path: the order in which ties are broken."""
    return {p: a for p, a in sorted(adapters.items()) if _trees.has_triplets(a)}


def _total(adapters: Adapters, init_budget: int | None, target_budget: int) -> int:
    """The number of triplets; raises ValueError unless it is the budget's start."""
    chosen = _chosen(adapters)
    if not chosen:
        kinds = sorted({type(a).__name__ for a in adapters.values()})
        raise ValueError(
            f"adalora found no AdaLora adapter among {', '.join(kinds)}; make them by "
            'Target(..., adapter="adalora")'
        )
    total = sum(adapter.lam.size for adapter in chosen.values())
    if init_budget not in (None, total):
        raise ValueError(
            f"init_budget={init_budget}, and the ranks of {len(chosen)} AdaLora "
            f"adapters sum to {total}; pass that, or None"
        )
    _require_room(total, target_budget)
    return total


def _importance(
    weights: Mapping[str, AdaLora],
    grads: Mapping[str, AdaLora],
    state: AdaLoraState,
    betas: tuple[_checks.Number, _checks.Number],
    frozen: jax.Array,
) -> tuple[Adapters, Adapters]:
    """The next Ibar and Ubar; the same ones when frozen."""
    beta1, beta2 = betas

    def averaged(old: jax.Array, new: jax.Array, beta: _checks.Number) -> jax.Array:
        return jnp.where(frozen, old, beta * old + (1 - beta) * new)

    def sensed(old: jax.Array, w: jax.Array, d: jax.Array) -> jax.Array:
        return averaged(old, jnp.abs(linalg.widened(w) * linalg.widened(d)), beta1)

    mean = jax.tree.map(sensed, state.sensitivity, weights, grads)
    # I - Ibar = (Ibar - its last value) beta1 / (1 - beta1): fewer arrays to read
    swing = beta1 / (1 - beta1)
    spread = jax.tree.map(
        lambda old, ibar, last: averaged(old, swing * jnp.abs(ibar - last), beta2),
        state.uncertainty,
        mean,
        state.sensitivity,
    )
    return mean, spread


def _choose(
    sensitivity: Adapters, uncertainty: Adapters, budget: jax.Array
) -> dict[str, jax.Array]:
    """True for the `budget` triplets of largest score, the earlier path where tied."""
    elements = jax.tree.map(jnp.multiply, sensitivity, uncertainty)
    scores = {path: _triplet_scores(s) for path, s in sorted(elements.items())}
    flat = jnp.concatenate([score.reshape(-1) for score in scores.values()])
    kept = jnp.argsort(jnp.argsort(-flat)) < budget  # ranks: safe for ties and b = b0
    ends = np.cumsum([score.size for score in scores.values()])[:-1]
    parts = zip(scores.items(), jnp.split(kept, ends), strict=True)
    return {path: part.reshape(score.shape) for (path, score), part in parts}


def _landing(
    updates: Adapters,
    adapters: Mapping[str, AdaLora],
    mask: Mapping[str, jax.Array],
    free: jax.Array,
) -> Adapters:
    """Updates with which lam lands on zero where neither mask nor free is set."""
    landed: Adapters = {}
    for path, update in _chosen(updates).items():
        lam = jnp.where(mask[path] | free, update.lam, -adapters[path].lam)
        landed[path] = dataclasses.replace(update, lam=lam)
    return {**updates, **landed}


def _triplet_scores(s: AdaLora) -> jax.Array:
    """S_i from the scores of the elements, `[*batch, rank]`."""
    batch = s.lam.ndim - 1
    ins, outs = range(batch, s.p.ndim - 1), range(batch + 1, s.q.ndim)
    return s.lam + s.p.mean(tuple(ins)) + s.q.mean(tuple(outs))
