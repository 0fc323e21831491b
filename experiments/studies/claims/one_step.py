"""Batch size and Adam's epsilon: the best rate of one step, measured and predicted.

    python -m experiments.studies.claims.one_step

all-MiniLM-L6-v2 (22.7 million parameters) learns banking77 with LoRA of rank 8 on all
36 linear kernels, as in the benchmark. After 20 and after 100 steps it stops, and 256
sentences are all the data there is: batches are drawn from them with replacement, so
that mean and standard deviation of each factor's gradient, and the loss, are known
without error. One step of Adam without memory,

    u = x / sqrt(x^2 + eps^2),    x the batch's gradient,

moves LoRA's factors, and the head stays. The best rate is where the loss on all
sentences is lowest, on the mean over 6 batches: rates a factor of 2 apart, and a
parabola through the best three. Epsilon is in units of the root mean square of x at 16
sentences. The laws of `lorax.scaling` get the noise that is there:

    sqrt             needs none
    surge,           N = tr Sigma / |g|^2, the simple noise scale
    mean_field
    per parameter    each parameter's own mean and deviation, and products with the
                     Hessian (`adam_epsilon_learning_rate`), noise being Gaussian and
                     independent between parameters

The best rate is the slope u . g over the curvature u . Hu, and the tables hold both
against the law's.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import app, flags

from experiments import paired
from experiments.machine import tables
from experiments.studies.claims import laws, steps
from experiments.studies.method import comparison, scorecard
from experiments.studies.pretrained import bases

_MINUTES = flags.DEFINE_float("one_step_minutes", None, "Time limit for new runs.")

POINTS = (20, 100)
"""Steps before the one that is studied."""
SIZES = (4, 16, 64, 256)
SPANS = ((4, 64), (64, 256))
"""Batch sizes between which the laws are tested."""
EPSILONS = (0.1, 1.0, 10.0)
CELLS = tuple(
    steps.Cell(point, *rest)
    for point in POINTS
    for rest in (*((b, 0.0) for b in SIZES), *((steps.USUAL, eps) for eps in EPSILONS))
)


def study(setting: Callable[[], Any], runs: comparison.Runs) -> dict[str, Any]:
    """Makes missing cells, and returns their lines by `name(cell)`."""

    @functools.lru_cache(1)
    def here(point: int) -> steps.Place:
        return steps.reach(setting(), point)

    found = {}
    for cell in CELLS:

        def made(cell: steps.Cell = cell) -> dict[str, Any]:
            return steps.measure(here(cell.point), cell)

        try:
            found[name(cell)] = runs.line(("MiniLM", *cell), made)
        except comparison.NotRun as error:
            print(f"CUT SHORT, not run: {error}")
    return found


def name(cell: steps.Cell) -> str:
    """The cell in words."""
    return f"after {cell.point} steps, batch {cell.batch}, epsilon {cell.eps:g}"


def page(found: Mapping[str, Any]) -> str:
    """Returns the study's page."""
    parts = [comparison.heading(__doc__)]
    head = ["batch", "epsilon", "best rate (95 %)", "per parameter"]
    head += ["octaves above it", "slope, over the law's", "curvature, over the law's"]
    for point in POINTS:
        own = {
            cell: found["cells"][name(cell)]
            for cell in CELLS
            if cell.point == point and name(cell) in found["cells"]
        }
        if own:
            rows = [_row(cell, line) for cell, line in own.items()]
            scale = next(iter(own.values()))["noise_scale"]
            parts += [f"## After {point} steps\n", tables.markdown(head, rows)]
            parts += [f"\nThe noise scale is {scale:.0f} sentences.\n"]
    return "\n".join([*parts, f"{found['cpu_seconds']} CPU-seconds.\n"])


def _row(cell: steps.Cell, line: Mapping[str, Any]) -> list[str]:
    mean, half = paired.interval(steps.octaves(line))
    bend = line["slope"] * line["law"] / 2**mean
    return [
        f"{cell.batch}",
        f"{cell.eps:g}",
        f"{2**mean:.2e} (x/ {2**half:.2f})",
        f"{line['law']:.2e}",
        f"{mean - math.log2(line['law']):+.2f}",
        f"{line['slope']:.2f}",
        f"{bend:.2f}",
    ]


def claims(found: Mapping[str, Any]) -> list[scorecard.Claim]:
    """Returns what the laws claim of the measured rates."""
    return [claim for point in POINTS for claim in _claims(found["cells"], point)]


def _claims(cells: Mapping[str, Any], point: int) -> list[scorecard.Claim]:
    usual = steps.Cell(point, steps.USUAL, 0.0)
    every: tuple[laws.Law, ...] = (*laws.LAWS, laws.PER_PARAMETER)
    pairs = [
        (
            usual._replace(batch=small),
            usual._replace(batch=large),
            law,
            f"from batch {small} to {large}",
        )
        for small, large in SPANS
        for law in every
    ]
    for eps in EPSILONS[1:]:
        told = f"from epsilon 0 to {eps:g} times the gradient"
        pairs.append((usual, usual._replace(eps=eps), laws.PER_PARAMETER, told))
    return [
        _claim(cells, one, other, law, told)
        for one, other, law, told in pairs
        if {name(one), name(other)} <= set(cells)
    ]


def _claim(
    cells: Mapping[str, Any],
    one: steps.Cell,
    other: steps.Cell,
    law: laws.Law,
    told: str,
) -> scorecard.Claim:
    """That the best rate changes between two cells as a law says."""
    first, second = cells[name(one)], cells[name(other)]
    if law == laws.PER_PARAMETER:
        predicted = math.log2(second["law"] / first["law"])
    else:
        scale = first["noise_scale"]
        predicted = laws.octaves(law, one.batch, other.batch, scale)
    found = steps.octaves(second) - steps.octaves(first)
    where = f"LoRA on MiniLM, one step after {one.point} others"
    return laws.claim(law, predicted, found, told, where)


def digest() -> str:
    """Returns a digest of what a run depends on."""
    shared = {**bases.SHARED, **bases.TASKS["banking77"].fields}
    own = [steps.RATE, steps.SEED, steps.ROWS, steps.USUAL, steps.DRAWS, steps.PROBES]
    return comparison.digest(shared, *own, jax.__version__)


def main(argv: Sequence[str]) -> None:
    """Resumes the study, and writes results and table."""
    del argv
    folder = comparison.folder("one_step")
    runs = comparison.Runs(folder / "runs.jsonl", {"MiniLM": digest()}, _MINUTES.value)
    cells = study(lambda: bases.make_setting(bases.TASKS["banking77"]), runs)
    seconds = sum(line["cpu_seconds"] for line in runs.lines.values())
    found = {"cells": cells, "cpu_seconds": round(seconds)}
    comparison.publish(folder, found, page)


if __name__ == "__main__":
    app.run(main)
