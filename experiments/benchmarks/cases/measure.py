"""Counts and checks: XLA's own cost model, and how closely programs must agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.cases.programs import Case


class Cost(NamedTuple):
    """What XLA says about a compiled program."""

    flops: float  # with the body of a loop counted once
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
    """Returns a function that runs one step to its end."""
    inputs = case.inputs()
    return lambda: jax.block_until_ready(compiled(*inputs))


def builder(case: Case) -> Callable[[], None]:
    """Returns a function that traces, lowers and compiles the step from scratch."""

    def build() -> None:
        jax.clear_caches()
        compile_step(case)

    return build


SPREAD = 10.0
"""How many times the smallest error of all programs another's may be."""


def limit(errors: Iterable[float], dtype: str = "float32") -> float:
    """Returns the largest error allowed, given the errors of several programs.

    Programs round in different orders, depending on the processor, so the best one sets
    the limit: `SPREAD` times the smallest error, or times the dtype's rounding if that
    is larger.
    """
    return SPREAD * max(float(jnp.finfo(dtype).eps), min(errors))


def agree_alike(found: Mapping[str, Any], exact: Any) -> None:
    """Raises unless several float32 programs are about equally close to float64.

    Args:
      found: a pytree of arrays by the program's name.
      exact: the same in float64; errors are relative to an array's largest entry.

    Raises:
      AssertionError: an error is above `limit`; names the program.
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
                f"{name} is {off:.1e} off float64; the best program's error allows "
                f"{allowed:.1e}"
            )


def agree(value: Any, expected: Any, tolerance: float) -> None:
    """Raises unless two arrays differ by at most `tolerance` of the largest entry."""
    largest = float(np.max(np.abs(expected)))
    np.testing.assert_allclose(value, expected, rtol=0, atol=tolerance * largest)
