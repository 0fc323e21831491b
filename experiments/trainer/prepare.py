"""Prepares a run: from a problem to adapters, optimiser state and a train step."""

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
        a reference, `(params, batch, said)`.
      params: the parameters to start from; they are not modified.
      targets: what trains.
      tx: any optax transformation.
      batches: indexed by step.
      quantize: rules for `lorax.quantize`, applied to the base after init, so that what
        an init moves into the adapters is not rounded; None: not quantised here.
      reference: `(frozen, params, batch) -> said`, as in `training.make_train_step`;
        None if the loss needs none.
      frozen: what the reference reads beside the base; None: the adapters that training
        begins with, or {} where they change nothing.
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
        """Returns what the loss takes after the base: a batch, and its reference."""
        if self.reference is None:
            return (batch,)
        frozen = {} if self.frozen is None else self.frozen
        return batch, jax.jit(self.reference)(frozen, self.params, batch)


class Calibration(NamedTuple):
    """How an init that reads data is calibrated.

    Attributes:
      batches: how many batches it reads, from the first.
      redistribute: with the init "eva", the largest multiple of its rank that a kernel
        may get where its components explain most; 1: every kernel keeps its own rank.
    """

    batches: int = 1
    redistribute: float = 1.0


FIRST_BATCH = Calibration()
"""One batch, and every kernel keeps its rank."""


def calibration_of(config: ml_collections.ConfigDict) -> Calibration:
    """Returns the calibration that an adapter's config asks for."""
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
    """Finds the kernels, initialises the adapters, and places what trains.

    Args:
      key: a typed key.
      problem: what is fitted.
      clip_norm: bound on the gradients' global norm, None for none.
      calibration: for inits that read data.
      place: where batches go.
      placed: where the parameters are; adapters and optimiser follow them.
      merge: what is evaluated: plain parameters, the default, or `unmerged.Unmerged`,
        which needs no second copy of the model. A quantised base is never merged.
      tell: called with what the targets adapt and leave out, unless all of them train
        whole leaves.
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
    if problem.reference:  # it reads the model at the start
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
    """Returns the targets, with ranks chosen from the data, and the data's statistics.

    Args:
      key: as for `begin`.
      problem: what is fitted.
      kernels: as `lorax.discover` finds them.
      calibration: how much of the data is read.
      place: where batches go.
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
    """Returns the initial train state, and the base that its adapters belong to.

    Args:
      key: a typed key.
      problem: what is fitted.
      kernels: as `lorax.discover` finds them.
      stats: from `calibrated`.
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
      start: the initial adapters, for a reference if `problem.frozen` is None.
    """
    loss_fn, reference = training.simple_loss(problem.loss_fn), problem.reference
    step = training.make_train_step(
        loss_fn, problem.tx, clip_norm=clip_norm, reference=reference
    )
    if reference is None:
        return Compiled(step, lies)
    frozen = start if problem.frozen is None else problem.frozen
    return Compiled(step, lies, (None, frozen))  # None: no pairs of a population


def laid_out(
    state: Any, params: Any, lies: Any, placed: sharding.Placed
) -> tuple[Any, Any]:
    """Returns state and base on their devices, frozen arrays of the base included.

    Args:
      state: the train state.
      params: the base.
      lies: shardings of the state.
      placed: where the parameters are.
    """
    base_lies = None
    if isinstance(params, lorax.Base):
        base_lies = sharding.base_shardings(params, state.adapters, placed)
    elif quantizing.packed(params):
        base_lies = placed.tree(params)
    # device_put of a key accepts only devices of this process
    state = jax.jit(lambda state: state, out_shardings=lies)(state)
    if base_lies is not None:
        params = jax.jit(lambda params: params, out_shardings=base_lies)(params)
    return state, params
