"""The only training loop, its clock, and its compiled step.

    clock = loop.Clock()
    state = loop.loop(prepared, batches, hooks, clock=clock, steps=90)

Hooks are called after every step, in the order given. What is not part of a step (a
compilation, an evaluation) goes inside `with clock.paused():`.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax

import lorax
from experiments.machine import placement


class Clock:
    """Times steps from one lap to the next, without pauses.

    Attributes:
      seconds: seconds per step, for each lap.
    """

    def __init__(self, start: int = 0) -> None:
        """Starts the first lap after step `start`."""
        self.seconds: list[float] = []
        self._step, self._began = start, time.perf_counter()

    def lap(self, step: int) -> float:
        """Ends a lap with `step`, and begins the next; returns seconds per step."""
        now = time.perf_counter()
        self.seconds.append((now - self._began) / (step - self._step))
        self._step, self._began = step, now
        return self.seconds[-1]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock for what happens inside."""
        paused = time.perf_counter()
        try:
            yield
        finally:
            self._began += time.perf_counter() - paused


class Compiled:
    """A train step, compiled once for each batch shape."""

    def __init__(
        self, step: Callable[..., Any], lies: Any = None, rest: Sequence[Any] = ()
    ) -> None:
        """Compiles nothing yet.

        Args:
          step: `(state, params, batch, *rest) -> (state, metrics)`; the state is
            donated.
          lies: shardings of the state that it returns; None: left to the compiler.
          rest: what the step takes after the batch, the same every time.
        """
        self._rest = tuple(rest)
        self._step = jax.jit(step, donate_argnums=0, out_shardings=(lies, None))
        self._by_shapes: dict[Any, Any] = {}

    def __call__(
        self, state: Any, params: Any, batch: Any, clock: Clock | None = None
    ) -> tuple[Any, Any]:
        """Makes a step; pauses the clock while it is compiled."""
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        if shapes not in self._by_shapes:
            with clock.paused() if clock else contextlib.nullcontext():
                lowered = self._step.lower(state, params, batch, *self._rest)
                self._by_shapes[shapes] = lowered.compile()
        return self._by_shapes[shapes](state, params, batch, *self._rest)

    def traced(self, state: Any, params: Any, batch: Any) -> Any:
        """Returns the jaxpr of a step, without compiling or running it."""
        return self._step.trace(state, params, batch, *self._rest).jaxpr


MERGED = jax.jit(lorax.merge)
"""`(adapters, params) -> plain parameters`, jitted."""


class Prepared(NamedTuple):
    """A run that is ready for its first step.

    Attributes:
      state: as `training.create_state` or `population.create_population` makes it.
      params: the base that the adapters belong to.
      step: the train step.
      place: where batches go.
      merge: makes what is evaluated from adapters and params: `MERGED` or `Unmerged`.
      tokens: number of tokens in the first batch, for the reported throughput.
      initial: the adapters at the start, if their init moved a part of the base; else
        None.
    """

    state: Any
    params: Any
    step: Compiled
    place: placement.Place = placement.ALONE
    merge: Callable[..., Any] = MERGED
    tokens: int = 0
    initial: dict[str, Any] | None = None


class Step(NamedTuple):
    """What a hook sees of a step that has been dispatched.

    Attributes:
      number: of the step; the first is 1.
      last: whether it is the last one.
      state: the state after the step; donated to the next.
      batch: the batch of the step.
      metrics: what the step returned beside the state.
    """

    number: int
    last: bool
    state: Any
    batch: Any
    metrics: dict[str, Any]

    def due(self, every: int) -> bool:
        """Whether something done every `every` steps is due; 0: only after the last."""
        return self.last or bool(every and self.number % every == 0)


def loop(
    prepared: Prepared,
    batches: grain.MapDataset,
    hooks: Sequence[Callable[[Step], Any]],
    *,
    clock: Clock,
    steps: int,
    start: int = 0,
) -> Any:
    """Makes the steps after `start`, and returns the state after the last.

    Args:
      prepared: the run; its state is donated.
      batches: indexed by step.
      hooks: called after every step, in this order.
      clock: times the steps.
      steps: the number of the last step.
      start: steps that the state has already made.
    """
    state = prepared.state
    stream = ahead(batches, start, steps)
    for number, rows in enumerate(stream, start + 1):
        batch = prepared.place.put(rows)
        state, metrics = prepared.step(state, prepared.params, batch, clock)
        step = Step(number, number == steps, state, batch, metrics)
        for hook in hooks:
            hook(step)
    return state


def ahead(dataset: grain.MapDataset, start: int, stop: int) -> Iterator[Any]:
    """Returns the batches `start` to `stop`, prefetched by threads."""
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return iter(dataset[start:stop].to_iter_dataset(options))
