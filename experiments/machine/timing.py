"""Comparative timing: interleaved rounds, and what a process has used."""

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
    """Runs every step once per round, in alternating order.

    A busy machine then slows all of them alike, so that ratios hold.

    Args:
      steps: what to time, by name; arrays that a step returns are waited for.
      rounds: number of rounds.
      clock: `time.process_time` counts only this process, on all its threads; with
        `usage`, each entry is an array.

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
    """Returns wall, CPU and kernel CPU seconds, and the number of minor page faults."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    wall, cpu = time.perf_counter(), used.ru_utime + used.ru_stime
    return np.array([wall, cpu, used.ru_stime, used.ru_minflt])
