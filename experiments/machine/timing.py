"""Timing side by side: interleaved rounds, and what a process has used."""

import resource
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

Clock = Callable[[], Any]


def interleave(
    steps: Mapping[str, Callable[[], Any]],
    rounds: int,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Runs every step once a round, in alternating order.

    A busy machine then slows all of them alike, and the ratios hold.

    Args:
      steps: what to time, by name; of arrays that one returns the end is awaited.
      rounds: how often.
      clock: `time.process_time` counts this process alone, on all its threads; of
        `usage` each entry is an array.

    Returns:
      Seconds by name, one per round.
    """
    seconds: dict[str, list[Any]] = {name: [] for name in steps}
    for i in range(-1, rounds):  # the first round warms up and is not counted
        for name in list(steps)[:: 1 if i % 2 else -1]:
            start = clock()
            jax.block_until_ready(steps[name]())
            if i >= 0:
                seconds[name].append(clock() - start)
    return seconds


def usage() -> np.ndarray:
    """Wall seconds, CPU seconds, those of them in the kernel, and minor page faults."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    wall, cpu = time.perf_counter(), used.ru_utime + used.ru_stime
    return np.array([wall, cpu, used.ru_stime, used.ru_minflt])
