"""What the studies share: paired differences, their table and their figure.

A result is `{"rate": learning rate, "curves": [seed][point]}`, what falls being better;
"LoRA" is the method that the others are held to.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from experiments.benchmarks import measure

_FOLDER = flags.DEFINE_string("study_dir", None, "Where results and figures go.")
SEEDS = flags.DEFINE_integer("seeds", 5, "Seeds to report.", lower_bound=2)

STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}
"""The two-sided 95 % quantile for n paired differences, by n."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, told apart with any colour vision."""


def folder(name: str) -> pathlib.Path:
    """Returns the study's folder, made if need be."""
    made = pathlib.Path(_FOLDER.value or f"runs/{name}")
    made.mkdir(parents=True, exist_ok=True)
    return made


def table(results: Mapping[str, Any], every: int = 1, digits: int = 4) -> str:
    """Returns markdown: method, rate, final value, paired difference, steps.

    Args:
      results: by method.
      every: steps between two points of a curve.
      digits: behind the point.
    """
    header = ["method", "rate", "final", "minus LoRA (95 %)", "steps to LoRA's final"]
    return measure.markdown(header, summary(results, every, digits))


def summary(
    results: Mapping[str, Any], every: int = 1, digits: int = 4
) -> list[list[str]]:
    """Returns the rows of `table`."""
    lora = np.array(results["LoRA"]["curves"])
    goal, n = lora[:, -1].mean(), len(lora)
    rows = []
    for name, result in results.items():
        curves = np.array(result["curves"])
        final, off = curves[:, -1], curves[:, -1] - lora[:, -1]
        error = lambda x: x.std(ddof=1) / math.sqrt(n)
        reached = np.flatnonzero(curves.mean(0) <= goal)
        half = STUDENT_T.get(n, 1.96) * error(off)
        verdict = "-"
        if name != "LoRA":
            verdict = f"{off.mean():+.{digits}f} +- {half:.{digits}f}"
            verdict += "" if abs(off.mean()) > half else ": no difference shown"
        rows.append(
            [
                name,
                f"{result['rate']:.2g}",
                f"{final.mean():.{digits}f} +- {error(final):.{digits}f}",
                verdict,
                str(every * (reached[0] + 1)) if len(reached) else "not",
            ]
        )
    return rows


def draw(
    results: Mapping[str, Mapping[str, Any]],
    path: pathlib.Path,
    labels: Sequence[str],
    every: int = 1,
) -> None:
    """Draws the mean curves of every problem, a panel each.

    Args:
      results: by problem and method.
      path: of the PNG.
      labels: of the axes, units included.
      every: steps between two points of a curve.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(4.5 * len(results), 3.4))
    for axis, (title, methods) in zip(
        np.atleast_1d(axes), results.items(), strict=True
    ):
        for colour, (name, result) in zip(COLOURS, methods.items(), strict=False):
            curve = np.array(result["curves"]).mean(0)
            steps = every * np.arange(1, len(curve) + 1)
            axis.semilogy(steps, curve, label=name, color=colour)
        axis.set(title=title, xlabel=labels[0], ylabel=labels[1])
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
