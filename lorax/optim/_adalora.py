"""AdaLoRA: allocates a total rank budget to the triplets that matter most to the loss.

The update is `scale * p diag(lam) q`. With d the gradient (including any penalty's) of
an element w of p, lam or q,

    I = |w d|,    Ibar <- b1 Ibar + (1 - b1) I,    Ubar <- b2 Ubar + (1 - b2) |I - Ibar|
    s = Ibar Ubar,    S_i = s(lam_i) + mean_j s(p_ji) + mean_j s(q_ij)

Every `interval` updates, the b(t) triplets with the largest S over all matrices are
chosen, and lam of the others is set to zero. p and q keep training, and so does lam
between two choices, so a pruned triplet can come back. After T - t_f, importance is
frozen (one update earlier in the released code) and the last choice is enforced at
every update.

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
    """The state of `adalora`; its trees hold the AdaLora paths alone.

    Attributes:
      count: int32 []; updates made.
      budget: int32 []; b(count), the total rank that the schedule allows.
      sensitivity: Ibar, `{path: AdaLora}` in the shapes of the adapters, float32.
      uncertainty: Ubar, in the same form.
      mask: `{path: bool [*batch, rank]}`; False for triplets that the last choice
        pruned.
      inner: state of the wrapped transformation.
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
    """Trains AdaLora adapters with `inner` and allocates their total rank.

    It wraps `inner` because it needs the final updates: put clipping, schedules and
    decay in `inner`, and chain nothing after it; only `optax.MultiSteps` may go around
    it. Adapters other than AdaLora are simply trained by `inner`.

    The program branches on the count alone. To train a population under `jax.vmap`,
    leave the count unbatched, so that steps that choose nothing also sort nothing: use
    `AdaLoraState(None, None, 0, 0, 0, 0)` as `in_axes` and `out_axes` of the state.
    With a batched count the result is the same, but every member sorts at every step.
    `pairs=` is ignored: the members of a population must have the same rank, as
    `lorax.population` requires for AdaLora.

    Args:
      inner: the optimiser, such as `optax.adamw(1e-3, mask=decay_mask)`.
      init_budget: b0, which must equal the sum of the ranks; None takes it from the
        adapters. Every layer of a stack counts as a matrix.
      target_budget: bT, the total rank at the end: the paper's average rank times the
        number of matrices. Published runs start from 1.5 bT.
      total_steps: T, the number of update calls; skipped ones do not count.
      initial_warmup: t_i, updates before the budget falls.
      final_steps: t_f, updates at the end with a fixed choice.
      interval: updates between two choices; None for max(10, total_steps // 200). At
        PEFT's 1, a pruned triplet has next to no chance of coming back.
      beta1: decay rate of Ibar; 0.85 as published.
      beta2: decay rate of Ubar; 0.85 as published.
      orthogonal_form: how p and q are pulled towards orthonormality: "decoupled", a
        step on each matrix after `inner`, seen by neither its moments nor the
        importance; "squared" or "norm", the gradient of
        `lorax.adapters.orthogonal_penalty`, added before both (the released code uses
        "norm"). Do not add a penalty to the loss as well.
      orthogonal_weight: weight of that pull; None for 0.3, 0.001 or 0.1, in the order
        of the forms. In "decoupled" it multiplies the fraction of p that `inner` moves,
        so it follows the learning rate. The paper's 0.1 weights a sum of squares: M
        times "squared".
      importance: which w enters |w d|: "post", after the update, as released; "pre",
        before it, as in the paper's Algorithm 1.

    Returns:
      An optax transformation; `update` needs the adapters, as `params`.

    Raises:
      ValueError: numbers out of range; at `init`, a tree without AdaLora, or ranks that
        do not sum to `init_budget`.
      TypeError: `inner` is not an optax transformation.

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
        uncertainty=jax.tree.map(jnp.copy, zeros),  # its own buffers, for donation
        mask={path: jnp.ones_like(a.lam, bool) for path, a in zeros.items()},
        inner=inner,
    )


def _wrapped(inner: Any) -> optax.GradientTransformationExtraArgs:
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            "inner must be an optax transformation, such as optax.adam(1e-3); got "
            f"{inner!r}. MultiSteps goes outside: optax.MultiSteps(adalora(...), k)"
        )
    return optax.with_extra_args_support(inner)


def _check(
    init_budget: int | None,
    target_budget: int,
    beta1: _checks.Number,
    beta2: _checks.Number,
    importance: str,
) -> None:
    """Raises ValueError for errors that show before the adapters are known."""
    if init_budget is not None:
        require_int("init_budget", init_budget, 1)
        _require_room(init_budget, target_budget)
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        _checks.number(name, beta)
        if not _traced(beta) and not 0 < beta < 1:
            raise ValueError(f"{name}={beta}; give a decay rate between 0 and 1")
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
            "both are total ranks over all AdaLora matrices: lower target_budget, or "
            "start from a larger rank"
        )


def _chosen(adapters: Mapping[str, Any]) -> dict[str, AdaLora]:
    """The AdaLora entries sorted by path, the order in which ties are broken."""
    return {p: a for p, a in sorted(adapters.items()) if _trees.has_triplets(a)}


def _total(adapters: Adapters, init_budget: int | None, target_budget: int) -> int:
    """The number of triplets; raises ValueError unless it equals `init_budget`."""
    chosen = _chosen(adapters)
    if not chosen:
        kinds = sorted({type(a).__name__ for a in adapters.values()})
        raise ValueError(
            f"adalora found no AdaLora adapter among {', '.join(kinds)}; make some "
            'with Target(..., adapter="adalora")'
        )
    total = sum(adapter.lam.size for adapter in chosen.values())
    if init_budget not in (None, total):
        raise ValueError(
            f"init_budget={init_budget}, but the ranks of {len(chosen)} AdaLora "
            f"adapters sum to {total}; pass that sum, or None"
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
    """The next Ibar and Ubar, unchanged when frozen."""
    beta1, beta2 = betas

    def averaged(old: jax.Array, new: jax.Array, beta: _checks.Number) -> jax.Array:
        return jnp.where(frozen, old, beta * old + (1 - beta) * new)

    def sensed(old: jax.Array, w: jax.Array, d: jax.Array) -> jax.Array:
        return averaged(old, jnp.abs(linalg.widened(w) * linalg.widened(d)), beta1)

    mean = jax.tree.map(sensed, state.sensitivity, weights, grads)
    # I - Ibar = (Ibar - its old value) beta1 / (1 - beta1): fewer arrays to read
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
    """True for the `budget` triplets with the largest scores; ties go by path."""
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
    """Updates that take lam to exactly zero unless `mask` or `free` is set."""
    landed: Adapters = {}
    for path, update in _chosen(updates).items():
        lam = jnp.where(mask[path] | free, update.lam, -adapters[path].lam)
        landed[path] = dataclasses.replace(update, lam=lam)
    return {**updates, **landed}


def _triplet_scores(s: AdaLora) -> jax.Array:
    """S_i, `[*batch, rank]`, from the scores of the elements."""
    batch = s.lam.ndim - 1
    ins, outs = range(batch, s.p.ndim - 1), range(batch + 1, s.q.ndim)
    return s.lam + s.p.mean(tuple(ins)) + s.q.mean(tuple(outs))
