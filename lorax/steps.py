"""A train step as a list of named parts, each a pure function of the work so far.

    gradients   loss, metrics, gradients, the model's new state
    check       |g|, and whether the step is usable (finite, with target tokens)
    clip        g <- g * min(1, clip_norm / |g|); zeros if it is not
    update      the optimiser's step: new adapters and optimiser state
    guard       keeps the old values if any new one would not be finite

`lorax.training.make_train_step` joins them. To customise the step, change the list:

    parts = training.train_parts(loss_fn, tx, clip_norm=1.0)
    parts.insert(2, training.Part("sharpen", sharpen))   # Work -> Work, after "check"
    step = training.join(parts)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorax.accumulation import accumulated, widen
from lorax.adapters import ranks
from lorax.losses import Metrics, cast
from lorax.types import Adapters, MicrobatchNorms, PairStatics, PyTree

Pairs = Mapping[str, PairStatics] | None


@dataclasses.dataclass(frozen=True)
class Work:
    """What is known partway through a step; each part returns it with more filled in.

    Attributes:
      state: the `lorax.training.TrainState` before the step.
      params: the frozen base.
      batch: this step's batch.
      pairs: a population member's own scales and ranks.
      frozen: what a reference reads besides the base.
      key: this step's key.
      values: loss and metrics.
      grads: the adapters' gradients; no part reads them after "update".
      norm: [], the global norm of the gradients before clipping.
      norms: gradient norms of the microbatches; None without accumulation.
      model_state: the model state after the batch.
      ok: [], False if the step must change nothing.
      adapters: the adapters after the step.
      opt_state: the optimiser state after the step.
    """

    state: Any
    params: PyTree
    batch: PyTree
    pairs: Pairs
    key: jax.Array
    frozen: PyTree = None
    values: Metrics = dataclasses.field(default_factory=dict)
    grads: Any = None
    norm: Any = None
    norms: MicrobatchNorms | None = None
    model_state: PyTree = None
    ok: Any = True
    adapters: Any = None
    opt_state: Any = None

    def replace(self, **fields: Any) -> Work:
        """Returns a copy with some fields replaced."""
        return dataclasses.replace(self, **fields)


class Part(NamedTuple):
    """A named part of a step.

    Attributes:
      name: identifies the part in a list.
      run: `Work -> Work`, pure.
    """

    name: str
    run: Callable[[Work], Work]


def join(parts: Sequence[Part]) -> Callable[..., Any]:
    """Joins parts into `step(state, params, batch, pairs=None, frozen=None)`.

    The step returns `(state, metrics)`.

    Raises:
      ValueError: two parts with the same name, or no "gradients" or "update" part.

    Example:
      >>> from lorax import training
      >>> import optax
      >>> loss_fn = training.simple_loss(lambda params, batch: jnp.sum(params["w"]))
      >>> [part.name for part in training.train_parts(loss_fn, optax.sgd(0.1))]
      ['gradients', 'check', 'clip', 'update', 'guard']
    """
    names = [part.name for part in parts]
    if len({*names}) < len(names):
        raise ValueError(f"parts are named {names}; give each a different name")
    if lacking := [name for name in ("gradients", "update") if name not in names]:
        raise ValueError(
            f"parts are {names}, without {lacking[0]!r}; a step needs it to have "
            "something to return"
        )

    def step(
        state: Any,
        params: PyTree,
        batch: PyTree,
        pairs: Pairs = None,
        frozen: PyTree = None,
    ) -> tuple[Any, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        work = Work(state, params, batch, pairs, key, frozen)
        for part in parts:
            work = part.run(work)
        skipped = state.skipped + jnp.where(work.ok, 0, 1)
        after = state.replace(
            adapters=work.adapters,
            opt_state=work.opt_state,
            model_state=work.model_state,
            step=state.step + 1,
            skipped=skipped,
        )
        return after, {**work.values, "grad_norm": work.norm, "skipped": skipped}

    return step


def gradients(value_and_grad: Callable[..., Any], accumulate: int = 1) -> Part:
    """Returns the part that computes loss, gradients and the model's new state.

    Args:
      value_and_grad: `(adapters, pairs, frozen, params, model_state, batch, key) ->
        ((loss, (metrics, model_state)), grads)`; it also takes `lora_key` if adapters
        have dropout.
      accumulate: microbatches per step, run sequentially.
    """

    def micro(state: Any, batch: PyTree, key: Any, params: PyTree, *known: Any) -> Any:
        loss_key, lora_key = jax.random.split(key)
        extra = {"lora_key": lora_key} if _has_dropout(state.adapters) else {}
        (loss, (metrics, model_state)), grads = value_and_grad(
            state.adapters, *known, params, state.model_state, batch, loss_key, **extra
        )
        return widen({**metrics, "loss": loss}), model_state, widen(grads)

    def whole(*args: Any) -> Any:
        return micro(*args), None

    found = whole if accumulate == 1 else accumulated(micro, accumulate)

    def run(work: Work) -> Work:
        known = work.params, work.pairs, work.frozen
        made, norms = found(work.state, work.batch, work.key, *known)
        values, model_state, grads = made
        return work.replace(
            values=values, model_state=model_state, grads=grads, norms=norms
        )

    return Part("gradients", run)


def check(work: Work) -> Work:
    """Computes the gradient norm; not ok unless it and the loss are finite."""
    norm = optax.tree.norm(work.grads)
    ok = work.ok & jnp.isfinite(work.values["loss"]) & jnp.isfinite(norm)
    return work.replace(norm=norm, ok=ok & (work.values.get("weight", 1.0) > 0))


def clip(clip_norm: float | None) -> Part:
    """Returns the part that clips the gradients' global norm; None for no clipping.

    If the step is not ok, it zeroes the gradients, since an eigendecomposition in the
    optimiser may not survive NaN.
    """

    def run(work: Work) -> Work:
        scale = 1.0 if clip_norm is None else jnp.minimum(1.0, clip_norm / work.norm)

        def clipped(g: jax.Array, leaf: jax.Array) -> jax.Array:
            return jnp.where(work.ok, scale * g, 0.0).astype(leaf.dtype)

        return work.replace(
            grads=jax.tree.map(clipped, work.grads, work.state.adapters)
        )

    return Part("clip", run)


def update(tx: optax.GradientTransformationExtraArgs) -> Part:
    """Returns the part that takes the optimiser's step."""

    def run(work: Work) -> Work:
        state = work.state
        extra = {"base": work.params, "pairs": work.pairs, "microbatch": work.norms}
        updates, opt_state = tx.update(
            work.grads, state.opt_state, state.adapters, **extra
        )
        updates = unpadded(updates, work.pairs)
        adapters = optax.apply_updates(state.adapters, updates)
        return work.replace(adapters=adapters, opt_state=opt_state)

    return Part("update", run)


def guard(work: Work) -> Work:
    """Keeps the old adapters, optimiser and model state if a new one is not finite.

    Finite gradients can still give a non-finite step: through a learning rate, a
    schedule, an epsilon of zero, or overflow in a small dtype.
    """
    state = work.state
    old = (state.adapters, state.opt_state, state.model_state)
    new = (work.adapters, work.opt_state, work.model_state)
    new = jax.tree.map(cast, new, old)  # may overflow here in a small dtype
    ok = work.ok & stays_finite(new, old)

    def keep(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(ok, new, old)

    adapters, opt_state, model_state = jax.tree.map(keep, new, old)
    return work.replace(
        adapters=adapters, opt_state=opt_state, model_state=model_state, ok=ok
    )


def unpadded(updates: Adapters, pairs: Pairs) -> Adapters:
    """Returns updates with zeros in the padded ranks beyond each member's true rank."""
    kept = {p: ranks.masked(updates[p], own.rank) for p, own in (pairs or {}).items()}
    return {**updates, **kept}


def stays_finite(new: PyTree, old: PyTree) -> jax.Array:
    """False if any finite number in `old` is no longer finite in `new`.

    Loss and gradients need not show this. On XLA:CPU the relu of NaN is 0, so NaN
    pixels give a finite loss, finite gradients and NaN BatchNorm statistics; an
    infinite learning rate, or Adam's 0 / (0 + eps) with an eps of 0, turns a good
    gradient into NaN. What was infinite before (the best value in a plateau schedule)
    may stay so.

    A leaf and its moments have paths with the same ending, `kernel/a`, and are sharded
    alike, so they share one reduction, which XLA fuses with the update.
    """
    alike: dict[Any, list[jax.Array]] = {}
    leaves = jax.tree_util.tree_leaves_with_path(new)
    for (path, now), before in zip(leaves, jax.tree.leaves(old), strict=True):
        if jnp.issubdtype(before.dtype, jnp.inexact):
            finite = jnp.isfinite(now) | ~jnp.isfinite(before)
            alike.setdefault((path[-2:], jax.typeof(finite)), []).append(finite)
    checks = [jnp.all(functools.reduce(jnp.logical_and, c)) for c in alike.values()]
    return jnp.all(jnp.array(checks, bool))


def _has_dropout(adapters: Adapters) -> bool:
    return any(getattr(adapter, "dropout", 0.0) for adapter in adapters.values())
