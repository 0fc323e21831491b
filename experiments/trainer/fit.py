"""Trains what a list of targets selects, by whatever optimiser: the one inner loop."""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import jax
import ml_collections
import rich.progress

import lorax
from experiments.data.batches import ahead
from experiments.machine import placement
from experiments.trainer import keeping, metric_log, metrics, nonfinite, progress
from lorax import adapters as adapter_classes
from lorax import inits, sharding, training, tree
from lorax.inits import eva


class Fit(NamedTuple):
    """What a fit leaves behind.

    Attributes:
      adapters: the trained leaves, by path.
      params: the parameters that the adapters belong to.
      trainable: number of trained array elements.
      opt_state_bytes: size of the optimiser's state.
      step_ms: median milliseconds a step, compilation and evaluation left out; NaN if
        no step was left to make.
      evaluation: what `evaluate` returned after the last step, {} without it.
      initial: the adapters at the start, if their init moved a part of the base; else
        None.
    """

    adapters: dict[str, Any]
    params: Any
    trainable: int
    opt_state_bytes: int
    step_ms: float
    evaluation: dict[str, float]
    initial: dict[str, Any] | None = None

    def merged(self) -> Any:
        """Plain parameters with what was learned."""
        return lorax.merge(self.adapters, self.params)


class Problem(NamedTuple):
    """What is fitted.

    Attributes:
      loss_fn: `(params, batch) -> (loss, metrics)`, written for plain parameters.
      params: the parameters to start from; left as they are.
      targets: what trains.
      tx: any optax transformation.
      batches: indexed by step.
      evaluate: merged parameters -> values to write; None for none.
    """

    loss_fn: Callable[..., Any]
    params: Any
    targets: Sequence[lorax.Target]
    tx: Any
    batches: grain.MapDataset
    evaluate: Callable[[Any], dict[str, float]] | None = None


class Recipe(NamedTuple):
    """How long, and how often what is done.

    Attributes:
      steps: how many.
      clip_norm: bound on the gradients' global norm, None for none.
      log_every: steps between two reports.
      eval_every: steps between two evaluations, 0 for one at the end.
      calibration_batches: how many of the first batches an init that looks at
        data gets.
      redistribute: with the init "eva", how many times its rank a kernel may get where
        its components explain most; 1: every kernel keeps its own.
    """

    steps: int
    clip_norm: float | None
    log_every: int
    eval_every: int = 0
    calibration_batches: int = 1
    redistribute: float = 1.0


class Around(NamedTuple):
    """Where a fit runs, and what it tells.

    Attributes:
      name: of the run, in the progress bar and the metrics.
      bars: where the progress bar goes.
      writer: where metrics go, None for nowhere.
      place: where batches lie.
      placed: where the parameters lie; adapters and optimiser follow them.
      keep: how the run keeps itself, to go on after a stop; None: not at all.
      guard: stops the run after too many steps that are not finite.
    """

    name: str
    bars: rich.progress.Progress
    writer: metric_log.Writer | None = None
    place: placement.Place = placement.ALONE
    placed: sharding.Placed | None = None
    keep: keeping.Keep | None = None
    guard: nonfinite.Guard | None = None


def recipe_of(config: ml_collections.ConfigDict) -> Recipe:
    """Returns the recipe of a run's config."""
    return Recipe(
        steps=config.run.steps,
        clip_norm=config.optimizer.clip_norm,
        log_every=config.run.log_every,
        eval_every=config.eval.every,
        calibration_batches=config.adapter.calibration_batches,
        redistribute=config.adapter.get("redistribute", 1.0),
    )


def fit(key: jax.Array, problem: Problem, recipe: Recipe, around: Around) -> Fit:
    """Fits adapters for a number of steps; `key` is a typed key."""
    loss_fn, params, targets, tx, batches, evaluate = problem
    steps, clip_norm, log_every, eval_every, calibration_batches, rho = recipe
    name, bars, writer, place, placed, keep, guard = around
    init_key, step_key = jax.random.split(key)
    example = place.put(batches[0])  # of all processes together
    kernels = lorax.discover(loss_fn, params, example)
    stats = None
    if any(inits.of_target(t).stats for t in targets):
        first = [place.put(batches[i]) for i in range(calibration_batches)]
        stats = lorax.calibrate(init_key, loss_fn, params, targets, first, kernels)
        if rho > 1:
            targets = eva.redistribute(params, targets, stats, kernels, rho)
    if not all(adapter_classes.get(target.adapter).replaces for target in targets):
        found = lorax.describe(params, targets, kernels)
        progress.tell_targets(bars.console, found)
    given = params
    adapters, params = lorax.init(init_key, params, targets, kernels, stats)
    moved = tree.split(params)[0] is not tree.split(given)[0]
    initial = jax.tree.map(jax.numpy.copy, adapters) if moved else None  # not donated
    state = training.create_state(step_key, adapters, tx)
    whole = state_lies = None  # as the arguments lie
    if placed:
        whole = placed.tree(tree.split(params)[0])
        replicate = bool(place.config.get("replicate_adapters"))
        state_lies = sharding.state_shardings(state, placed, replicate)
        # device_put of a key asks for devices of this process alone
        state = jax.jit(lambda state: state, out_shardings=state_lies)(state)
        if isinstance(params, lorax.Base):
            lies = sharding.base_shardings(params, adapters, placed)
            params = jax.jit(lambda params: params, out_shardings=lies)(params)
    step = jax.jit(
        training.make_train_step(
            training.simple_loss(loss_fn), tx, clip_norm=clip_norm
        ),
        donate_argnums=0,
        out_shardings=(state_lies, None),
    )
    compiled: dict[Any, Any] = {}  # by a batch's shapes: no part of a step's time
    merge = jax.jit(lorax.merge, out_shardings=whole)
    tokens = max(leaf.size for leaf in jax.tree.leaves(example))
    meter = progress.Meter(bars, name, steps)
    times: list[float] = []
    evaluation: dict[str, float] = {}

    with contextlib.ExitStack() as stack:
        keeper = stack.enter_context(keeping.Keeper(keep, params)) if keep else None
        state, start = keeper.restore(state) if keeper else (state, 0)
        if keeper and writer:
            writer.rewind(start)
        if guard:
            guard.start(int(state.skipped))
        began, reported, losses = time.perf_counter(), start, []
        stream = ahead(batches, start, steps)
        for i, rows in enumerate(stream, start + 1):
            batch = place.put(rows)
            shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
            if shapes not in compiled:
                paused = time.perf_counter()
                compiled[shapes] = step.lower(state, params, batch).compile()
                began += time.perf_counter() - paused
            state, values = compiled[shapes](state, params, batch)
            losses.append(values["loss"])
            if guard:
                guard.watch(i, batch, values)
                if i == steps:
                    guard.finish()
            if i % log_every == 0 or i == steps:
                values = jax.device_get(values)  # waits for the step
                # The mean since the last report: batches differ by their documents.
                values["loss"] = statistics.fmean(map(float, losses))
                times.append((time.perf_counter() - began) / (i - reported))
                meter.update(i, values["loss"] * metrics.BITS, tokens / times[-1])
                if writer:
                    writer.write(name, i, {**values, "step_ms": times[-1] * 1e3})
                began, reported, losses = time.perf_counter(), i, []
            if evaluate and (i == steps or (eval_every and i % eval_every == 0)):
                jax.block_until_ready(state)
                paused = time.perf_counter()
                evaluation = evaluate(merge(state.adapters, params))
                if writer:
                    writer.write(name, i, evaluation)
                began += time.perf_counter() - paused  # evaluation is no part of a step
            if keeper:
                keeper.after(state, i)
    if evaluate and not evaluation:  # the run was over when it was taken up again
        evaluation = evaluate(merge(state.adapters, params))

    return Fit(
        adapters=state.adapters,
        params=params,
        trainable=metrics.size(state.adapters),
        opt_state_bytes=metrics.nbytes(state.opt_state),
        step_ms=statistics.median(times) * 1e3 if times else math.nan,
        evaluation=evaluation,
        initial=initial,
    )
