"""One training run of a study: from a seed and a learning rate to a short curve."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
import optax
from absl import logging

import lorax
from experiments.trainer import objects, optimizers, prepare
from experiments.trainer.loop import Clock, Prepared, Step, loop


class Run(NamedTuple):
    """The result of a run.

    Attributes:
      curve: values of `evaluate`; NaN where the last step was skipped as non-finite,
        because the value of a stalled run is not a result.
      watched: what `watch` returned at the same steps.
      ms: milliseconds of a step, the fastest stretch between two evaluations.
    """

    curve: list[float]
    watched: list[Any]
    ms: float


def make_start(
    config: ml_collections.ConfigDict,
    loss_fn: Callable[..., Any],
    base: Any,
    train: Callable[[int], Any],
    method: str = "lora",
) -> Callable[[int, float], Prepared]:
    """Returns how an arm starts, `(seed, learning rate) -> Prepared`.

    One compilation serves all seeds and rates, because the learning rate is in the
    optimiser's state.

    Args:
      config: its `run.steps`, `adapter` and `optimizer` say how to train.
      loss_fn: `(params, batch) -> (loss, metrics)`, written for plain parameters.
      base: the parameters to start from; they are not modified.
      train: seed -> batches, indexed by step.
      method: "lora" or "full".
    """

    def make_tx(learning_rate: float) -> optax.GradientTransformation:
        return optimizers.make_optimizer(
            learning_rate, config.run.steps, config.optimizer
        )

    targets = objects.make_targets(method, config.adapter)
    tx = optax.inject_hyperparams(make_tx)(learning_rate=1.0)
    problem = prepare.Problem(loss_fn, base, targets, tx, train(0))
    kernels = lorax.discover(loss_fn, base, problem.batches[0])
    logging.info("%s", lorax.describe(base, targets, kernels))
    step = prepare.make_step(problem, config.optimizer.clip_norm)
    looked: dict[int, Any] = {}  # calibration by seed, shared by the rates of a grid

    def start(seed: int, rate: float) -> Prepared:
        key = jax.random.fold_in(jax.random.key(seed), 1)
        own = prepare.Problem(loss_fn, base, targets, tx, train(seed))
        if seed not in looked:
            calibration = prepare.calibration_of(config.adapter)
            looked[seed] = prepare.calibrated(key, own, kernels, calibration)
        ranked, stats = looked[seed]
        own = own._replace(targets=ranked)
        state, params = prepare.begin(key, own, kernels, stats)
        state.opt_state.hyperparams["learning_rate"] = jax.numpy.float32(rate)
        return Prepared(state, params, step)

    return start


def make_run(
    config: ml_collections.ConfigDict,
    loss_fn: Callable[..., Any],
    base: Any,
    train: Callable[[int], Any],
    method: str = "lora",
) -> Callable[..., Run]:
    """Returns `run(seed, rate, evaluate, every, watch=None) -> Run`.

    `watch(seed, step, state, params)` gets the train state and the base that it adapts.
    Arguments are those of `make_start`.
    """
    start, steps = make_start(config, loss_fn, base, train, method), config.run.steps

    def run(
        seed: int,
        rate: float,
        evaluate: Callable[[Any], float],
        every: int,
        watch: Callable[..., Any] | None = None,
    ) -> Run:
        prepared, clock = start(seed, rate), Clock()
        found, watched = list[float](), list[Any]()
        skipped: Any = 0

        def follow(step: Step) -> None:
            nonlocal skipped
            last, skipped = skipped, step.metrics["skipped"]
            if not step.due(every):
                return
            jax.block_until_ready(step.state)
            clock.lap(step.number)
            with clock.paused():
                params = prepared.merge(step.state.adapters, prepared.params)
                stalled = int(skipped) > int(last)
                found.append(math.nan if stalled else evaluate(params))
                if watch is not None:
                    watched.append(
                        watch(seed, step.number, step.state, prepared.params)
                    )

        loop(prepared, train(seed), [follow], clock=clock, steps=steps)
        return Run(found, watched, 1e3 * min(clock.seconds))

    return run
