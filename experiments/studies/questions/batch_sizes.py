"""Batch size and the best learning rate: which law?

At a fixed number of steps, each batch size gets a grid of rates, and two more rates
around its best; a parabola through the best and its two neighbours gives the optimum.
Each law of `lorax.scaling` is fitted to the logarithms of the optima, with a constant
factor and, except for "sqrt" and "linear", its noise scale.

References:
  Li et al., Surge Phenomenon in Optimal Learning Rate and Batch Size Scaling,
  arXiv:2405.14578; Su, kexue.fm 10542; `lorax.scaling`.
"""

from typing import Any

import numpy as np

from experiments.machine import tables
from experiments.studies.method import panels, text
from lorax import scaling

SIZES = (4, 8, 16, 32, 64)
LAWS: tuple[scaling.BatchRule, ...] = ("sqrt", "surge", "mean_field")
SCALES = 2.0 ** np.arange(-2, 17, 0.25)
"""Noise scales that the fit tries, in examples."""

STUDY = text.Study(
    "batch_sizes",
    "How does the best learning rate grow with the batch?",
    {f"batch {size}": {"data.batch_size": size} for size in SIZES},
    "batch 16",
    refine=True,
    seeds=(1, 2),
)


def optimum(grid: Any) -> float:
    """Returns the vertex of a parabola through the best rate and its two neighbours.

    Args:
      grid: rate -> score, lower is better.
    """
    points = sorted((np.log(float(rate)), score) for rate, score in grid.items())
    at = min(range(len(points)), key=lambda i: points[i][1])
    if at in (0, len(points) - 1):
        return float(np.exp(points[at][0]))
    x, y = np.array(points[at - 1 : at + 2]).T
    a, b, _ = np.polyfit(x - x[1], y, 2)
    return float(np.exp(np.clip(x[1] - b / (2 * a), x[0], x[2])))


def fit(sizes: Any, rates: Any, law: scaling.BatchRule) -> tuple[float, float, float]:
    """Returns the constant, the noise scale (NaN if the law has none) and the error.

    Args:
      sizes: of the batches.
      rates: the best rate of each.
      law: of `scaling.BATCH_RULES`.

    Returns:
      The rate at the first size, N, and the root mean square of log2(fit / rate).
    """
    best = (np.nan, np.nan, np.inf)
    for scale in (None,) if law in ("sqrt", "linear") else SCALES:
        shape = [
            scaling.learning_rate_for_batch(1.0, sizes[0], size, law, noise_scale=scale)
            for size in sizes
        ]
        off = np.log2(np.array(rates) / np.array(shape))
        error = float(off.std())
        if error < best[2]:
            best = float(2 ** off.mean()), np.nan if scale is None else scale, error
    return best


def _optima(results: Any) -> tuple[list[int], list[float]]:
    found = [size for size in SIZES if f"batch {size}" in results["arms"]]
    grids = [results["arms"][f"batch {size}"]["grid"] for size in found]
    return found, [optimum(grid) for grid in grids]


def laws(axis: Any, results: Any) -> None:
    """Draws the optima and the fitted laws."""
    sizes, rates = _optima(results)
    axis.plot(sizes, rates, "ko", label="best rate")
    fine = np.geomspace(sizes[0], sizes[-1], 50)
    looks = zip(LAWS, ("-", "--", ":"), tables.COLOURS, strict=False)
    for law, line, colour in looks:
        constant, scale, _ = fit(sizes, rates, law)
        known = None if np.isnan(scale) else scale
        values = [
            scaling.learning_rate_for_batch(
                constant, sizes[0], size, law, noise_scale=known
            )
            for size in fine
        ]
        axis.plot(fine, values, line, color=colour, label=law)
    axis.set(xscale="log", yscale="log", xlabel="batch size (examples)")
    axis.set(ylabel="best learning rate")
    panels.label_sizes(axis.xaxis, sizes)
    axis.legend(fontsize=7)


def notes(results: Any) -> list[str]:
    """Returns notes for the page: the optima and every law's fit."""
    sizes, rates = _optima(results)
    told = ", ".join(
        f"{rate:.2g} at {size}" for size, rate in zip(sizes, rates, strict=True)
    )
    lines = [f"Best rates, interpolated, one seed: {told}."]
    for law in LAWS:
        _, scale, error = fit(sizes, rates, law)
        known = "" if np.isnan(scale) else f", noise scale {scale:.3g} examples"
        at_edge = scale in (SCALES[0], SCALES[-1])
        known += " (the edge of what was tried)" if at_edge else ""
        lines.append(f"{law}: {error:.2f} octaves off (rms){known}")
    return lines


PANELS = (panels.rates, laws)
