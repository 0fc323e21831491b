"""Counting and timing: XLA's own cost model, interleaved rounds, best of several."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.benchmarks.programs import Case

Clock = Callable[[], float]


class Cost(NamedTuple):
    """What XLA says about a compiled program."""

    flops: float  # the body of a loop counted once
    temp: int  # bytes


def compile_step(case: Case) -> jax.stages.Compiled:
    """Traces and compiles value and gradient, with nothing cached."""
    return jax.jit(case.step()).lower(*case.inputs()).compile()


def cost(compiled: jax.stages.Compiled) -> Cost:
    """Reads the cost of a program."""
    analysis: Any = compiled.cost_analysis()
    memory: Any = compiled.memory_analysis()
    return Cost(analysis["flops"], memory.temp_size_in_bytes)


def runner(compiled: jax.stages.Compiled, case: Case) -> Callable[[], Any]:
    """Each call runs one step to its end."""
    inputs = case.inputs()
    return lambda: jax.block_until_ready(compiled(*inputs))


def builder(case: Case) -> Callable[[], None]:
    """Each call traces, lowers and compiles the step from nothing."""

    def build() -> None:
        jax.clear_caches()
        compile_step(case)

    return build


def interleave(
    steps: Mapping[str, Callable[[], Any]],
    rounds: int,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Runs every step once a round, in alternating order.

    A busy machine then slows all of them alike, and the ratios hold.

    Args:
      steps: what to time, by name.
      rounds: how often.
      clock: `time.process_time` counts this process alone, on all its threads.

    Returns:
      Seconds by name, one per round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(-1, rounds):  # the first round warms up and is not counted
        for name in list(steps)[:: 1 if i % 2 else -1]:
            start = clock()
            steps[name]()
            if i >= 0:
                seconds[name].append(clock() - start)
    return seconds


def agree(value: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Raises unless two arrays differ by at most `tolerance` of the largest entry."""
    largest = float(np.max(np.abs(expected)))
    np.testing.assert_allclose(value, expected, rtol=0, atol=tolerance * largest)


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """The median over rounds of one step's time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; the first column left, the others right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
