"""From what is to be fitted to a run that can make its first step."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import ml_collections

import lorax
from experiments.generation import quantizing, unmerged
from experiments.machine import placement
from experiments.trainer.loop import MERGED, Compiled, Prepared
from lorax import adapters as adapter_classes
from lorax import description, inits, sharding, training, tree
from lorax.inits import eva


class Problem(NamedTuple):
    """What is fitted.

    Attributes:
      loss_fn: `(params, batch) -> (loss, metrics)`, written for plain parameters; with
        a reference `(params, batch, said)`.
      params: the parameters to start from; left as they are.
      targets: what trains.
      tx: any optax transformation.
      batches: indexed by step.
      quantize: rules of `lorax.quantize` for the base that an init leaves, so that what
        it moves into the adapters is not rounded; None: the base stays as it is.
      reference: `(frozen, params, batch) -> said`, as `training.make_train_step` takes
        it; None: the loss needs none.
      frozen: what the reference reads beside the base; None: the adapters that training
        begins with, {} where they change nothing.
    """

    loss_fn: Callable[..., Any]
    params: Any
    targets: Sequence[lorax.Target]
    tx: Any
    batches: grain.MapDataset
    quantize: Any = None
    reference: training.Reference | None = None
    frozen: Any = None

    def given(self, batch: Any) -> tuple[Any, ...]:
        """What the loss takes behind the base: a batch, and what is said of it."""
        if self.reference is None:
            return (batch,)
        frozen = {} if self.frozen is None else self.frozen
        return batch, jax.jit(self.reference)(frozen, self.params, batch)


class Calibration(NamedTuple):
    """What an init that looks at data gets.

    Attributes:
      batches: how many of the first ones.
      redistribute: with the init "eva", how many times its rank a kernel may get where
        its components explain most; 1: every kernel keeps its own.
    """

    batches: int = 1
    redistribute: float = 1.0


FIRST_BATCH = Calibration()
"""The first batch, and every kernel keeps its rank."""


def calibration_of(config: ml_collections.ConfigDict) -> Calibration:
    """Returns what the config of an adapter says."""
    return Calibration(config.calibration_batches, config.get("redistribute", 1.0))


def prepare(
    key: jax.Array,
    problem: Problem,
    *,
    clip_norm: float | None = None,
    calibration: Calibration = FIRST_BATCH,
    place: placement.Place = placement.ALONE,
    placed: sharding.Placed | None = None,
    merge: Callable[..., Any] = MERGED,
    tell: Callable[[description.Description], None] | None = None,
) -> Prepared:
    """Finds the kernels, draws the adapters, and lays out what trains.

    Args:
      key: a typed key.
      problem: what is fitted.
      clip_norm: bound on the gradients' global norm, None for none.
      calibration: for inits that look at data.
      place: where batches lie.
      placed: where the parameters lie; adapters and optimiser follow them.
      merge: what is evaluated: plain parameters, as by default, or
        `unmerged.Unmerged`, which holds no second copy of the model. A quantised base
        is never merged.
      tell: gets what the targets adapt and leave out, unless all train whole leaves.
    """
    example = place.put(problem.batches[0])  # of all processes together
    said = jax.eval_shape(problem.given, example)[1:]
    kernels = lorax.discover(problem.loss_fn, problem.params, example, *said)
    targets, stats = calibrated(key, problem, kernels, calibration, place)
    problem = problem._replace(targets=targets)
    whole = (adapter_classes.get(target.adapter).replaces for target in targets)
    if tell and not all(whole):
        tell(lorax.describe(problem.params, targets, kernels))
    state, params = begin(key, problem, kernels, stats)
    moved = tree.split(params)[0] is not tree.split(problem.params)[0]
    if problem.quantize:
        params = lorax.quantize(params, problem.quantize, kernels)
    lies = None
    if placed:
        cut = place.config.get("adapters", "auto")
        lies = sharding.state_shardings(state, placed, cut)
        state, params = laid_out(state, params, lies, placed)
    same = all(inits.of_target(target).keeps_base for target in targets)
    start = {} if same else jax.tree.map(jnp.copy, state.adapters)  # not donated
    if quantizing.packed(params):
        merge = unmerged.Unmerged
    if problem.reference:  # what it says is of the model at the start
        merge = functools.partial(unmerged.Unmerged, start=start)
    return Prepared(
        state,
        params,
        make_step(problem, clip_norm, lies, start),
        place,
        merge,
        tokens=max(leaf.size for leaf in jax.tree.leaves(example)),
        initial=start if moved else None,
    )


def calibrated(
    key: jax.Array,
    problem: Problem,
    kernels: Any,
    calibration: Calibration,
    place: placement.Place = placement.ALONE,
) -> tuple[Sequence[lorax.Target], Any]:
    """Returns the targets, with the ranks that data gives them, and data's statistics.

    Args:
      key: as for `begin`.
      problem: what is fitted.
      kernels: as `lorax.discover` finds them.
      calibration: what of the data is looked at.
      place: where batches lie.
    """
    params, targets = problem.params, problem.targets
    if not any(inits.of_target(target).stats for target in targets):
        return targets, None

    def loss_fn(params: Any, given: tuple[Any, ...]) -> Any:
        return problem.loss_fn(params, *given)

    batches = map(problem.batches.__getitem__, range(calibration.batches))
    first = [problem.given(place.put(batch)) for batch in batches]
    init_key, _ = jax.random.split(key)
    stats = lorax.calibrate(init_key, loss_fn, params, targets, first, kernels)
    rho = calibration.redistribute
    if rho > 1:
        targets = eva.redistribute(params, targets, stats, kernels, rho)
    return targets, stats


def begin(
    key: jax.Array, problem: Problem, kernels: Any, stats: Any = None
) -> tuple[training.TrainState, Any]:
    """Returns the train state at the start, and the base that its adapters belong to.

    Args:
      key: a typed key.
      problem: what is fitted.
      kernels: as `lorax.discover` finds them.
      stats: of `calibrated`.
    """
    init_key, step_key = jax.random.split(key)
    adapters, params = lorax.init(
        init_key, problem.params, problem.targets, kernels, stats
    )
    return training.create_state(step_key, adapters, problem.tx), params


def make_step(
    problem: Problem,
    clip_norm: float | None = None,
    lies: Any = None,
    start: Any = None,
) -> Compiled:
    """Returns the train step of a problem.

    Args:
      problem: what is fitted.
      clip_norm: bound on the gradients' global norm, None for none.
      lies: as for `Compiled`.
      start: adapters that training begins with, for a reference that has nothing else.
    """
    loss_fn, reference = training.simple_loss(problem.loss_fn), problem.reference
    step = training.make_train_step(
        loss_fn, problem.tx, clip_norm=clip_norm, reference=reference
    )
    if reference is None:
        return Compiled(step, lies)
    frozen = start if problem.frozen is None else problem.frozen
    return Compiled(step, lies, (None, frozen))  # no pairs of a population


def laid_out(
    state: Any, params: Any, lies: Any, placed: sharding.Placed
) -> tuple[Any, Any]:
    """State and base on their devices; of the base the frozen arrays beside it.

    Args:
      state: the train state.
      params: the base.
      lies: shardings of the state.
      placed: where the parameters lie.
    """
    base_lies = None
    if isinstance(params, lorax.Base):
        base_lies = sharding.base_shardings(params, state.adapters, placed)
    elif quantizing.packed(params):
        base_lies = placed.tree(params)
    # device_put of a key asks for devices of this process alone
    state = jax.jit(lambda state: state, out_shardings=lies)(state)
    if base_lies is not None:
        params = jax.jit(lambda params: params, out_shardings=base_lies)(params)
    return state, params
