"""Fits a prepared run: the loop with its reports, evaluations, guard, checkpoints."""

import contextlib
import functools
import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import grain
import jax
import ml_collections
import rich.progress

from experiments.trainer import keeping, metric_log, metrics, nonfinite, progress
from experiments.trainer.loop import MERGED, Clock, Prepared, Step, loop


class Schedule(NamedTuple):
    """How long to train, and how often to report and evaluate.

    Attributes:
      steps: number of steps.
      log_every: steps between two reports.
      eval_every: steps between two evaluations, 0 for one at the end.
    """

    steps: int
    log_every: int
    eval_every: int = 0


class Output(NamedTuple):
    """Where a run reports.

    Attributes:
      name: of the run, in the progress bar and the metrics.
      bars: the display that gets the run's progress bar.
      log: where metrics go, None for nowhere.
    """

    name: str
    bars: rich.progress.Progress
    log: metric_log.Writer | None = None

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Appends values to the metrics log, if there is one."""
        if self.log:
            self.log.write(self.name, step, values)


class Fit(NamedTuple):
    """The result of a fit.

    Attributes:
      adapters: the trained leaves, by path.
      params: the parameters that the adapters belong to.
      trainable: number of trained array elements.
      opt_state_bytes: size of the optimiser's state.
      step_ms: median milliseconds per step, without compilation and evaluation; NaN if
        no step was left to make.
      evaluation: what `evaluate` returned after the last step, {} without it.
      initial: the adapters at the start, if their init moved a part of the base; else
        None.
      merge: as in `loop.Prepared`.
    """

    adapters: dict[str, Any]
    params: Any
    trainable: int
    opt_state_bytes: int
    step_ms: float
    evaluation: dict[str, float]
    initial: dict[str, Any] | None = None
    merge: Callable[..., Any] = MERGED

    def merged(self) -> Any:
        """Returns the adapted parameters: plain ones, or quantised as the base is."""
        return self.merge(self.adapters, self.params)


def schedule_of(config: ml_collections.ConfigDict) -> Schedule:
    """Returns the schedule of a run's config."""
    return Schedule(config.run.steps, config.run.log_every, config.eval.every)


def fit(
    prepared: Prepared,
    batches: grain.MapDataset,
    schedule: Schedule,
    output: Output,
    *,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    keep: keeping.Keep | None = None,
    guard: nonfinite.Guard | None = None,
) -> Fit:
    """Makes all steps of a prepared run, or those left after its last checkpoint.

    Args:
      prepared: the run; its state is donated.
      batches: indexed by step.
      schedule: how long to train, and how often to report and evaluate.
      output: where the run reports.
      evaluate: maps what `prepared.merge` returns to values to write; None: never.
      keep: where and how the run saves itself, to resume after a stop; None: it does
        not.
      guard: stops the run after too many non-finite steps.
    """
    with contextlib.ExitStack() as stack:
        start, hooks = 0, list[Callable[[Step], None]]()
        if keep:
            keeper = stack.enter_context(keeping.Keeper(keep, prepared.params))
            state, start = keeper.restore(prepared.state)
            prepared = prepared._replace(state=state)
            if output.log:
                output.log.rewind(start)
        if guard:
            guard.start(int(prepared.state.skipped))
            hooks.append(functools.partial(_watch, guard))
        clock = Clock(start)
        hooks.append(Report(prepared.tokens, schedule, output, clock))
        scores = Scores(evaluate, prepared, schedule, output, clock)
        hooks.append(scores.after)
        if keep:
            hooks.append(lambda step: keeper.after(step.state, step.number))
        state = loop(
            prepared, batches, hooks, clock=clock, steps=schedule.steps, start=start
        )
    return Fit(
        adapters=state.adapters,
        params=prepared.params,
        trainable=metrics.size(state.adapters),
        opt_state_bytes=metrics.nbytes(state.opt_state),
        step_ms=statistics.median(clock.seconds) * 1e3 if clock.seconds else math.nan,
        evaluation=scores.final(state),
        initial=prepared.initial,
        merge=prepared.merge,
    )


def _watch(guard: nonfinite.Guard, step: Step) -> None:
    """A hook: the guard checks every step, and after the last leaves none unchecked."""
    guard.watch(step.number, step.batch, step.metrics)
    if step.last:
        guard.finish()


class Report:
    """A hook that moves the bar and writes metrics every `schedule.log_every` steps."""

    def __init__(
        self, tokens: int, schedule: Schedule, output: Output, clock: Clock
    ) -> None:
        """Adds a bar.

        Args:
          tokens: number of tokens in a step.
          schedule: how often to report.
          output: where to report.
          clock: of the steps; every report is a lap.
        """
        self._tokens, self._every = tokens, schedule.log_every
        self._output, self._clock = output, clock
        self._meter = progress.Meter(output.bars, output.name, schedule.steps)
        self._losses: list[Any] = []

    def __call__(self, step: Step) -> None:
        """Records the loss, and reports if a report is due."""
        self._losses.append(step.metrics["loss"])
        if not step.due(self._every):
            return
        found = jax.device_get((step.metrics, self._losses))  # waits for the step
        # The mean since the last report: single batches are noisy.
        values = {**found[0], "loss": statistics.fmean(map(float, found[1]))}
        seconds = self._clock.lap(step.number)
        pace = self._tokens / seconds
        self._meter.update(step.number, values["loss"], pace)
        self._output.write(step.number, {**values, "step_ms": seconds * 1e3})
        self._losses = []


class Scores:
    """The evaluations of the model, at intervals and at the end."""

    def __init__(
        self,
        evaluate: Callable[[Any], dict[str, float]] | None,
        prepared: Prepared,
        schedule: Schedule,
        output: Output,
        clock: Clock,
    ) -> None:
        """Evaluates nothing yet; arguments as for `fit`."""
        self._evaluate, self._every = evaluate, schedule.eval_every
        self._merge, self._params = prepared.merge, prepared.params
        self._output, self._clock = output, clock
        self._values: dict[str, float] = {}

    def after(self, step: Step) -> None:
        """A hook: evaluates if that is due, with the clock paused."""
        if self._evaluate is None or not step.due(self._every):
            return
        jax.block_until_ready(step.state)
        with self._clock.paused():
            self._values = self._evaluate(
                self._merge(step.state.adapters, self._params)
            )
            self._output.write(step.number, self._values)

    def final(self, state: Any) -> dict[str, float]:
        """Returns the last values; evaluates if a resumed run had no steps left."""
        if self._evaluate is not None and not self._values:
            self._values = self._evaluate(self._merge(state.adapters, self._params))
        return self._values
