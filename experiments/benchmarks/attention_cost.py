"""What the implementations of attention cost on this machine, relative to plain.

    python -m experiments.benchmarks.attention_cost

Prints a markdown table for the value and gradients of causal attention in float32: the
time, as the median ratio to plain attention over interleaved rounds, and the compiler's
temporary memory.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments import paired
from experiments.machine import tables, timing
from lorax import attention

NAMES = ("plain", "lean", "tiles")
"""The implementations that every platform has."""

_ROUNDS = flags.DEFINE_integer("attention_rounds", 9, "Interleaved rounds.")


class Shape(NamedTuple):
    """Sizes of an attention; heads have size 64."""

    batch: int
    time: int
    heads: int
    kv_heads: int


SHAPES = (Shape(4, 256, 12, 12), Shape(2, 1024, 12, 12), Shape(1, 2048, 8, 2))


class Cost(NamedTuple):
    """An implementation's time over plain attention's, and its temporary MiB."""

    ratio: float
    temporary: float


def compare(shape: Shape, rounds: int) -> dict[str, Cost]:
    """Returns the cost of each implementation."""
    keys = jax.random.split(jax.random.key(0), 3)
    counts = shape.heads, shape.kv_heads, shape.kv_heads
    qkv = [
        jax.random.normal(key, (shape.batch, shape.time, n, 64))
        for key, n in zip(keys, counts, strict=True)
    ]
    steps = {name: _step(name).lower(*qkv).compile() for name in NAMES}
    runners = {name: functools.partial(step, *qkv) for name, step in steps.items()}
    seconds = timing.interleave(runners, rounds)
    return {
        name: Cost(
            paired.ratio(seconds[name], seconds["plain"]),
            step.memory_analysis().temp_size_in_bytes / 2**20,
        )
        for name, step in steps.items()
    }


def _step(name: str) -> Any:
    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        mixed = attention.attend(q, k, v, causal=True, implementation=name)
        return jnp.sum(mixed**2)

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))


def main(argv: Sequence[str]) -> None:
    """Prints the table."""
    del argv
    rows = []
    for shape in SHAPES:
        sizes = f"{shape.batch} x {shape.time}, {shape.heads} heads, {shape.kv_heads}"
        for name, cost in compare(shape, _ROUNDS.value).items():
            told = f"{cost.ratio:.2f}", f"{cost.temporary:.0f}"
            rows.append([f"{sizes} of keys", name, *told])
    header = ["batch x time", "attention", "time / plain", "temporary, MiB"]
    print(
        f"{tables.caption(tables.about(('jax',)))}\n\n{tables.markdown(header, rows)}"
    )


if __name__ == "__main__":
    app.run(main)
