"""The one inner loop, its clock, and the step that it makes.

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
    """Times steps by stretches, from one lap to the next, pauses left out.

    Attributes:
      seconds: of a step, by stretch.
    """

    def __init__(self, start: int = 0) -> None:
        """Starts the first stretch behind step `start`."""
        self.seconds: list[float] = []
        self._step, self._began = start, time.perf_counter()

    def lap(self, step: int) -> float:
        """Ends a stretch with `step`, begins the next; returns its seconds a step."""
        now = time.perf_counter()
        self.seconds.append((now - self._began) / (step - self._step))
        self._step, self._began = step, now
        return self.seconds[-1]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside counts for no step."""
        paused = time.perf_counter()
        try:
            yield
        finally:
            self._began += time.perf_counter() - paused


class Compiled:
    """A train step, compiled once for every shape of a batch."""

    def __init__(
        self, step: Callable[..., Any], lies: Any = None, rest: Sequence[Any] = ()
    ) -> None:
        """Compiles nothing yet.

        Args:
          step: `(state, params, batch, *rest) -> (state, metrics)`; the state is
            donated.
          lies: shardings of the state that it returns; None: as they come.
          rest: what the step takes behind the batch, the same every time.
        """
        self._rest = tuple(rest)
        self._step = jax.jit(step, donate_argnums=0, out_shardings=(lies, None))
        self._by_shapes: dict[Any, Any] = {}

    def __call__(
        self, state: Any, params: Any, batch: Any, clock: Clock | None = None
    ) -> tuple[Any, Any]:
        """Makes a step; the clock is paused where it has to be compiled."""
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        if shapes not in self._by_shapes:
            with clock.paused() if clock else contextlib.nullcontext():
                lowered = self._step.lower(state, params, batch, *self._rest)
                self._by_shapes[shapes] = lowered.compile()
        return self._by_shapes[shapes](state, params, batch, *self._rest)

    def traced(self, state: Any, params: Any, batch: Any) -> Any:
        """Returns the jaxpr of a step, which is neither compiled nor made."""
        return self._step.trace(state, params, batch, *self._rest).jaxpr


MERGED = jax.jit(lorax.merge)
"""`(adapters, params) -> plain parameters`, jitted."""


class Prepared(NamedTuple):
    """A run that can make its first step.

    Attributes:
      state: as `training.create_state` or `population.create_population` makes it.
      params: the base that the adapters belong to.
      step: the train step.
      place: where batches lie.
      merge: what is evaluated, of adapters and params: as `MERGED`, or `Unmerged`.
      tokens: of the first batch, for the pace that is told.
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
      state: after it; donated to the next.
      batch: that it was given.
      metrics: that it returned.
    """

    number: int
    last: bool
    state: Any
    batch: Any
    metrics: dict[str, Any]

    def due(self, every: int) -> bool:
        """Whether what is done every so many steps is due; 0: after the last alone."""
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
      clock: of the steps.
      steps: the number of the last step.
      start: steps that the state has made.
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
    """The batches `start` to `stop`, made by threads before they are asked for."""
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return iter(dataset[start:stop].to_iter_dataset(options))
