"""LoRA+: the best ratio of both learning rates against width.

The claim: the best lr_b / lr_a grows with the width n, as n in the paper and as
sqrt(n / r) where Adam's steps count by the loss. Models of four widths, of 64 to a
head, are pretrained alike; at each a ratio is an arm with learning rates of its own. A
parabola in the logarithm of the ratio through the final values of a seed gives its best
ratio, kept within what was tried, and the exponent is the slope of log(best ratio)
against log(n), a value a seed.

References:
  Hayou et al., LoRA+, arXiv:2402.12354: ratio of order n.
  Su, kexue.fm 10001: sqrt(n / r) for square layers.
"""

from typing import Any

import numpy as np

from experiments import paired
from experiments.machine import tables
from experiments.studies.method import panels, text
from experiments.studies.questions import lora_plus_grid

WIDTHS = (64, 128, 256, 512)
RATIOS = (1, 4, 16, 64)
HEAD = 64


def name(width: int, ratio: int) -> str:
    """Of an arm."""
    return f"n = {width}, ratio {ratio}"


def _arm(width: int, ratio: int) -> dict[str, Any]:
    return {
        "model.width": width,
        "model.heads": width // HEAD,
        "model.hidden": 3 * width,
        **lora_plus_grid.arm(float(ratio)),
    }


STUDY = text.Study(
    "widths",
    "Does the best ratio of b's learning rate to a's grow with the width?",
    {name(n, ratio): _arm(n, ratio) for n in WIDTHS for ratio in RATIOS},
    name(256, 1),
    grids={
        name(n, ratio): lora_plus_grid.grid(ratio) for n in WIDTHS for ratio in RATIOS
    },
    seeds=(1, 2, 3),
)
PAIRS = tuple((name(n, r), name(n, 1)) for n in WIDTHS for r in RATIOS if r != 1)
"""Further pairs that the table holds against each other."""


def best_ratio(values: Any) -> float:
    """The ratio at the vertex of a parabola through the values of RATIOS.

    Args:
      values: `[ratios]`, lower is better.

    Returns:
      The vertex, or the better end where it lies outside or is a maximum.
    """
    x = np.log2(RATIOS)
    a, b, _ = np.polyfit(x, values, 2)
    if a <= 0:
        return float(RATIOS[0] if values[0] <= values[-1] else RATIOS[-1])
    return float(2 ** np.clip(-b / (2 * a), x[0], x[-1]))


def bests(results: Any) -> dict[int, np.ndarray]:
    """The best ratio of every seed, by width, of widths whose arms are all there."""
    found = {}
    for n in WIDTHS:
        arms = [name(n, ratio) for ratio in RATIOS]
        if set(arms) <= set(results["arms"]):
            final = np.array([panels.final(results, arm) for arm in arms])
            found[n] = np.array([best_ratio(values) for values in final.T])
    return found


def exponents(ratios: dict[int, np.ndarray]) -> np.ndarray:
    """The slope of log(best ratio) against log(width), a value a seed."""
    x = np.log2(list(ratios))
    return np.polyfit(x, np.log2(np.array(list(ratios.values()))), 1)[0]


def losses(axis: Any, results: Any) -> None:
    """By ratio, minus the value at ratio 1, a line a width."""
    for n, mark, colour in zip(WIDTHS, panels.MARKS, tables.COLOURS, strict=False):
        if name(n, 1) not in results["arms"]:
            continue
        there = [ratio for ratio in RATIOS if name(n, ratio) in results["arms"]]
        base = panels.final(results, name(n, 1))
        off = [panels.final(results, name(n, ratio)) - base for ratio in there]
        means = [values.mean() for values in off]
        error = [paired.standard_error(values) for values in off]
        look: Any = {"marker": mark, "color": colour, "label": f"n = {n}", "capsize": 3}
        axis.errorbar(there, means, error, **look)
    axis.axhline(0, color="black", linewidth=0.7)
    axis.set(xscale="log", xlabel="lr of b / lr of a")
    axis.set(ylabel="bits per byte minus ratio 1's")
    panels.label_sizes(axis.xaxis, RATIOS)
    axis.legend(fontsize=7)


def law(axis: Any, results: Any) -> None:
    """The best ratio by width, every seed, beside n and sqrt(n)."""
    found = bests(results)
    if not found:
        axis.set(title="no width is complete")
        return
    widths = list(found)
    for n, values in found.items():
        told = "a seed" if n == widths[0] else None
        axis.plot([n] * len(values), values, "ko", markersize=4, alpha=0.6, label=told)
    mean = np.array([2 ** np.log2(values).mean() for values in found.values()])
    axis.plot(widths, mean, "k_", markersize=16, label="geometric mean of the seeds")
    shapes = ((1.0, "--", "n"), (0.5, ":", "sqrt(n)"))
    for (power, line, label), colour in zip(shapes, tables.COLOURS, strict=False):
        shape = np.array(widths) ** power
        scale = 2 ** np.mean(np.log2(mean / shape))
        axis.plot(widths, scale * shape, line, color=colour, label=f"fit of {label}")
    axis.set(
        xscale="log", yscale="log", xlabel="width n", ylabel="best lr of b / lr of a"
    )
    panels.label_sizes(axis.xaxis, widths)
    low, high = axis.get_ylim()
    ticks = [2**i for i in range(7) if low <= 2**i <= high]
    panels.label_sizes(axis.yaxis, ticks)
    axis.legend(fontsize=7)


def notes(results: Any) -> list[str]:
    """What the page says beside the table: the best ratios and their exponent."""
    found = bests(results)
    if len(found) < 2:
        return []
    told = ", ".join(
        f"{2 ** np.log2(values).mean():.3g} at n = {n}" for n, values in found.items()
    )
    exponent = paired.difference(exponents(found), 2)
    return [
        f"Best ratios, geometric means over seeds: {told}.",
        f"Exponent of the width (0: no growth; 1: n; 0.5: sqrt(n)): {exponent}",
    ]


PANELS = (losses, law)
