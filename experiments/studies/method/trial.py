"""One training run of a study: from a seed and a learning rate to a short curve."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
import optax
from absl import logging

import lorax
from experiments.trainer import objects, optimizers
from lorax import inits, training
from lorax.inits import eva


class Run(NamedTuple):
    """What a run leaves.

    Attributes:
      curve: values of `evaluate`; NaN where the step before it was skipped as not
        finite: the value of a stalled run is not a result.
      watched: what `watch` returned at the same steps.
      ms: milliseconds of a step, the fastest stretch between two evaluations.
    """

    curve: list[float]
    watched: list[Any]
    ms: float


class Trial(NamedTuple):
    """How an arm trains; one compilation serves all its seeds and rates.

    Attributes:
      start: `(seed, learning rate) -> (train state, the base that it adapts)`.
      step: `(state, base, batch) -> (state, metrics)`, jitted; the state is donated.
    """

    start: Callable[[int, float], tuple[Any, Any]]
    step: Callable[..., tuple[Any, Any]]


def make_trial(
    config: ml_collections.ConfigDict,
    loss_fn: Callable[..., Any],
    base: Any,
    train: Callable[[int], Any],
    method: str = "lora",
) -> Trial:
    """Builds an arm; the learning rate is in the optimiser's state.

    Args:
      config: its `run.steps`, `adapter` and `optimizer` say how to train.
      loss_fn: `(params, batch) -> (loss, metrics)`, written for plain parameters.
      base: the parameters to start from; left as they are.
      train: seed -> batches, indexed by step.
      method: "lora" or "full".
    """
    steps, targets = config.run.steps, objects.make_targets(method, config.adapter)
    rho = config.adapter.get("redistribute", 1.0)
    looks = any(inits.of_target(t).stats for t in targets)
    kernels = lorax.discover(loss_fn, base, train(0)[0])
    logging.info("%s", lorax.describe(base, targets, kernels))
    tx = optax.inject_hyperparams(
        lambda learning_rate: optimizers.make_optimizer(
            learning_rate, steps, config.optimizer
        )
    )(learning_rate=1.0)
    step = jax.jit(
        training.make_train_step(
            training.simple_loss(loss_fn), tx, clip_norm=config.optimizer.clip_norm
        ),
        donate_argnums=0,
    )
    gradients: dict[int, Any] = {}  # sketches by seed: the rates of a grid share them

    def start(seed: int, rate: float) -> tuple[Any, Any]:
        init_key, key = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1))
        if looks and seed not in gradients:
            batches = train(seed)
            first = [batches[i] for i in range(config.adapter.calibration_batches)]
            gradients[seed] = lorax.calibrate(
                init_key, loss_fn, base, targets, first, kernels
            )
        own, stats = targets, gradients.get(seed)
        if stats is not None and rho > 1:
            own = eva.redistribute(base, targets, stats, kernels, rho)
        adapters, params = lorax.init(init_key, base, own, kernels, stats)
        state = training.create_state(key, adapters, tx)
        state.opt_state.hyperparams["learning_rate"] = jax.numpy.float32(rate)
        return state, params

    return Trial(start, step)


def make_run(
    config: ml_collections.ConfigDict,
    loss_fn: Callable[..., Any],
    base: Any,
    train: Callable[[int], Any],
    method: str = "lora",
) -> Callable[..., Run]:
    """Returns `run(seed, rate, evaluate, every, watch=None) -> Run`.

    `watch(seed, step, state, params)` sees the train state and the base that it adapts.
    Arguments are those of `make_trial`.
    """
    trial, steps = make_trial(config, loss_fn, base, train, method), config.run.steps
    merge = jax.jit(lorax.merge)

    def run(
        seed: int,
        rate: float,
        evaluate: Callable[[Any], float],
        every: int,
        watch: Callable[..., Any] | None = None,
    ) -> Run:
        batches, (state, params) = train(seed), trial.start(seed, rate)
        found, watched, ms, before = [], [], [], 0
        skipped: Any = 0
        began = time.perf_counter()
        for i in range(1, steps + 1):
            state, values = trial.step(state, params, batches[i - 1])
            last, skipped = skipped, values["skipped"]
            if i % every == 0 or i == steps:
                jax.block_until_ready(state)
                ms.append(1e3 * (time.perf_counter() - began) / (i - before))
                stalled = int(skipped) > int(last)
                value = math.nan if stalled else evaluate(merge(state.adapters, params))
                found.append(value)
                if watch is not None:
                    watched.append(watch(seed, i, state, params))
                began, before = time.perf_counter(), i
        return Run(found, watched, min(ms[1:] or ms))  # the first stretch compiles

    return run
