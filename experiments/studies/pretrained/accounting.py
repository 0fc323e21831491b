"""What an arm costs: parameters, optimiser state, operations and time of a step."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from experiments.machine import timing
from experiments.studies.method import trial
from experiments.studies.pretrained import arms, bases
from experiments.trainer import loop, metrics
from lorax import analysis

STRETCH = 10  # steps that are timed together: AdaLoRA chooses its triplets every tenth


class Cost(NamedTuple):
    """Of one arm.

    Attributes:
      trained: parameters.
      state: bytes of the optimiser's state.
      operations: of a step's matrix products, loops counted as often as they run.
    """

    trained: int
    state: int
    operations: int


def cost(task: bases.Task, arm: arms.Arm, setting: bases.Setting) -> Cost:
    """Returns what an arm costs, from a step that is traced and not run."""
    prepared, batch = _prepared(task, arm, setting)
    state = prepared.state
    return Cost(
        metrics.size(state.adapters),
        metrics.nbytes(state.opt_state),
        analysis.operations(prepared.step.traced(state, prepared.params, batch)),
    )


def times(
    task: bases.Task, setting: bases.Setting, rounds: int = 7
) -> dict[str, float]:
    """Returns milliseconds of a step by arm, interleaved, the best of `rounds`."""
    found = bases.arms_of(task)
    steps = {n: _stretch(*_prepared(task, a, setting)) for n, a in found.items()}
    seconds = timing.interleave(steps, rounds)
    return {name: 1e3 * min(own) / STRETCH for name, own in seconds.items()}


def _stretch(prepared: loop.Prepared, batch: Any) -> Callable[[], Any]:
    """A few steps of an arm, each call going on from the last."""
    state = prepared.state

    def run() -> Any:
        nonlocal state
        for _ in range(STRETCH):
            state, _ = prepared.step(state, prepared.params, batch)
        return state

    return run


def _prepared(
    task: bases.Task, arm: arms.Arm, setting: bases.Setting
) -> tuple[loop.Prepared, Any]:
    """An arm before its first step, and a batch of the middle length.

    It starts as LoRA does, since the start does not count in a step.
    """
    fields: Mapping[str, Any] = dict(arm.fields)
    if fields.get("adapter.init"):
        fields = {k: v for k, v in fields.items() if k != "adapter.options"}
        fields |= {"adapter.init": "standard"}
    config = bases.configured(task, arm._replace(fields=fields))
    start = trial.make_start(
        config, setting.loss_fn, setting.base, setting.train, config.run.methods[0]
    )
    return start(0, 1e-4), _batch(config, setting)


def _batch(config: Any, setting: bases.Setting) -> Any:
    length = config.data.lengths[len(config.data.lengths) // 2]
    made = (setting.train(0)[i] for i in range(config.run.steps))
    return next(
        batch
        for batch in made
        if max(leaf.shape[-1] for leaf in jax.tree.leaves(batch) if leaf.ndim) == length
    )
