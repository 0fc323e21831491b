"""Counting and timing: XLA's own cost model, interleaved rounds, best of several."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import pathlib
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.programs import Case

Clock = Callable[[], Any]


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


SPREAD = 10.0
"""How far above the smallest error of a program another's may be."""


def limit(errors: Iterable[float], dtype: str = "float32") -> float:
    """Returns what no error of several programs may exceed.

    Programs round in different orders, which depends on the processor, so what one can
    expect of them is read off the best: `SPREAD` times the smallest error, or the
    dtype's own rounding where that is larger.
    """
    return SPREAD * max(float(jnp.finfo(dtype).eps), min(errors))


def agree_alike(found: Mapping[str, Any], exact: Any) -> None:
    """Raises unless several float32 programs are about equally close to the truth.

    Args:
      found: a pytree of arrays by the program's name.
      exact: the same in float64; errors are relative to an array's largest entry.

    Raises:
      AssertionError: an error above `limit`; it names the program.
    """

    def error(value: Any, true: Any) -> float:
        off = np.abs(np.asarray(value, np.float64) - true).max()
        return float(off / np.abs(true).max())

    errors = {
        name: max(jax.tree.leaves(jax.tree.map(error, tree, exact)))
        for name, tree in found.items()
    }
    allowed = limit(errors.values())
    for name, off in errors.items():
        if not off <= allowed:  # NaN as well
            raise AssertionError(
                f"{name} is {off:.1e} off float64, and what the best program reaches "
                f"allows {allowed:.1e}"
            )


def agree(value: Any, expected: Any, tolerance: float) -> None:
    """Raises unless two arrays differ by at most `tolerance` of the largest entry."""
    largest = float(np.max(np.abs(expected)))
    np.testing.assert_allclose(value, expected, rtol=0, atol=tolerance * largest)


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """The median over rounds of one step's time over another's in the same round."""
    return statistics.median(paired_ratios(numerator, denominator))


def paired_ratios(
    numerator: Sequence[float], denominator: Sequence[float]
) -> list[float]:
    """One step's time over another's, round by round."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


def about(packages: Sequence[str]) -> dict[str, Any]:
    """Returns what a table is of: date, command, device, versions, malloc's settings.

    Args:
      packages: names of distributions; those that are not installed are left out.
    """
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    called = f"python -m {spec.name}" if spec else "python"
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join([called, *sys.argv[1:]]),
        "device": _device(),
        "versions": versions,
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ""),
    }


def caption(facts: Mapping[str, Any]) -> str:
    """Returns `about` in one sentence."""
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items())
    malloc = facts["GLIBC_TUNABLES"]
    command = f"{f'GLIBC_TUNABLES={malloc} ' if malloc else ''}{facts['command']}"
    return f"{facts['date']}, {facts['device']}; {versions}; `{command}`"


def _device() -> str:
    """The accelerator, or the processor and how many of its cores may be used."""
    if jax.default_backend() != "cpu":
        return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    own = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    name, info = platform.machine(), pathlib.Path("/proc/cpuinfo")
    if info.exists():
        found = [line for line in info.read_text().splitlines() if "model name" in line]
        name = found[0].partition(":")[2].strip() if found else name
    return f"{len(own(0))} cores of {name}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; the first column left, the others right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
