"""Figures of the studies: panels side by side, legible at a README's width."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments import paired
from experiments.machine import tables

Results = Mapping[str, Any]
Panel = Callable[[Any, Results], None]
MARKS = "osD^vP*X<>"
BITS = "held-out bits per byte"


def figure(results: Results, path: pathlib.Path, *panels: Panel) -> None:
    """Draws the panels of a study; toy results are marked as such.

    Args:
      results: as `text.results` returns them.
      path: of the PNG.
      *panels: functions of a matplotlib axis and the results.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (4.4 * len(panels), 4.2)
    made, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained")
    for axis, panel in zip(np.atleast_1d(axes), panels, strict=True):
        panel(axis, results)
        tidy(axis)
    if results["smoke"]:
        made.text(
            0.5, 0.5, "toy sizes: no result", fontsize=30, color="red", alpha=0.4,
            ha="center", va="center", rotation=20,
        )  # fmt: skip
    made.savefig(path, dpi=110)
    plt.close(made)


def tidy(axis: Any, columns: int = 2) -> None:
    """Puts the legend below the panel, and whole numbers on an axis of steps.

    Args:
      axis: of a figure whose layout is "constrained".
      columns: of the legend.
    """
    from matplotlib import ticker

    if axis.get_legend() is not None:
        axis.legend(
            fontsize=8, ncols=columns, frameon=False,
            loc="upper center", bbox_to_anchor=(0.5, -0.17),
        )  # fmt: skip
    if axis.get_xlabel() == "step":
        axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axis.spines[["top", "right"]].set_visible(False)


def styles(results: Results) -> dict[str, dict[str, Any]]:
    """Returns colour, mark and line of every arm."""
    found = {}
    for i, arm in enumerate(results["arms"]):
        again = i // len(tables.COLOURS)
        found[arm] = {
            "color": tables.COLOURS[i % len(tables.COLOURS)],
            "marker": MARKS[i % len(MARKS)],
            "linestyle": ("-", "--", ":")[again % 3],
            "markersize": 4,
        }
    return found


def label_sizes(line: Any, sizes: Sequence[float]) -> None:
    """Labels a logarithmic axis with only the sizes, without ticks between.

    Args:
      line: `axis.xaxis` or `axis.yaxis`.
      sizes: the labels.
    """
    line.set_ticks(sizes, [f"{size:g}" for size in sizes])
    line.set_ticks([], minor=True)


def rates(axis: Any, results: Results) -> None:
    """Draws scores on the selection split by learning rate, for one seed."""
    seen: list[float] = []
    for arm, style in styles(results).items():
        grid = sorted((float(k), v) for k, v in results["arms"][arm]["grid"].items())
        axis.plot(*zip(*grid, strict=True), label=arm, **style)
        seen += [value for _, value in grid]
    axis.set(xscale="log", xlabel="learning rate", ylabel=f"{BITS} (selection)")
    leave_out_diverged(axis, seen)
    axis.legend(fontsize=7)


def leave_out_diverged(axis: Any, values: Sequence[float], span: float = 0.4) -> None:
    """Ends the axis `span` above the best value, and says so if it cuts values off."""
    best = float(np.nanmin(values))
    if not np.nanmax(values) <= best + span:
        axis.set_ylim(best - 0.05 * span, best + span)
        axis.set_title(f"{axis.get_title()} (what diverged is above)", fontsize=9)


def curves(axis: Any, results: Results) -> None:
    """Draws the mean over seeds at the best rate, by step."""
    for arm, style in styles(results).items():
        mean = np.mean(results["arms"][arm]["curves"], 0)
        axis.plot(steps_of(results), mean, label=arm, **style)
    axis.set(xlabel="step", ylabel=BITS)
    axis.legend(fontsize=7)


def steps_of(results: Results) -> np.ndarray:
    """Returns the steps of a curve's points."""
    return results["every"] * np.arange(1, results["steps"] // results["every"] + 1)


def final(results: Results, arm: str) -> np.ndarray:
    """Returns the final values of an arm's seeds."""
    return np.array(results["arms"][arm]["curves"])[:, -1]


def by_size(
    axis: Any, results: Results, sizes: Sequence[int], arms: Mapping[str, Any]
) -> None:
    """Draws final values by a size: mean and standard error over seeds.

    Args:
      axis: of the panel.
      results: has the arms.
      sizes: along the axis.
      arms: label of a line -> function from a size to the name of its arm.
    """
    looks = zip(arms.items(), MARKS, tables.COLOURS, strict=False)
    for (label, name), mark, colour in looks:
        found = [size for size in sizes if name(size) in results["arms"]]
        values = [final(results, name(size)) for size in found]
        error = [paired.standard_error(v) for v in values]
        means = [v.mean() for v in values]
        look: Any = {"marker": mark, "color": colour, "label": label, "capsize": 3}
        axis.errorbar(found, means, error, **look)
    axis.set(ylabel=BITS)
    axis.legend(fontsize=7)


def by_arm(axis: Any, results: Results) -> None:
    """Draws final values with a line per arm: mean and standard error over seeds."""
    for row, (arm, style) in enumerate(styles(results).items()):
        values = final(results, arm)
        error = paired.standard_error(values)
        axis.errorbar(values.mean(), row, xerr=error, capsize=3, **style)
    axis.axvline(
        final(results, results["baseline"]).mean(), color="black", linewidth=0.7
    )
    axis.set_yticks(range(len(results["arms"])), results["arms"], fontsize=7)
    axis.invert_yaxis()
    axis.set(xlabel=BITS)


def watched(field: str, label: str, but: str = "") -> Panel:
    """Returns a panel of what was watched, as the mean over seeds by step.

    Args:
      field: a key of what `watch` returned.
      label: of the axis, with its unit.
      but: an arm to leave out.
    """

    def panel(axis: Any, results: Results) -> None:
        for arm, style in styles(results).items():
            runs = results["arms"][arm]["watched"]
            mean = np.mean([[point[field] for point in run] for run in runs], 0)
            if arm != but:
                axis.plot(steps_of(results), mean, label=arm, **style)
        axis.set(xlabel="step", ylabel=label)
        axis.legend(fontsize=7)

    return panel
