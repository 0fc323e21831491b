"""Figures of a run as SVG: curves, spectra, rank maps; legends beside the axes."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.machine import tables
from lorax import analysis

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Label -> (values on the x-axis, values on the y-axis)."""


def lines(series: Series, x: str, y: str, *, logarithmic: bool = False) -> str:
    """Returns an SVG of some curves.

    Args:
      series: what to draw.
      x: the label of the x-axis, which is a count: its ticks are integers.
      y: the label of the y-axis.
      logarithmic: makes the y-axis logarithmic; values that are not positive are then
        left out.
    """
    figure, axes = _figure(6.4, 3.0)
    for i, (label, (at, values)) in enumerate(series.items()):
        colour = tables.COLOURS[i % len(tables.COLOURS)]
        dash = ("-", "--", ":", "-.")[i // len(tables.COLOURS) % 4]
        marker = "o" if len(at) < 12 else None
        axes.plot(at, values, dash, color=colour, marker=marker, ms=3, label=label)
    if logarithmic:
        axes.set_yscale("log", nonpositive="mask")
    axes.set(xlabel=x, ylabel=y)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_facecolor("none")  # the page's, light or dark
    axes.grid(alpha=0.25)
    if len(series) > 1:
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return _svg(figure)


def rank_map(values: Mapping[str, Any], title: str) -> str:
    """Returns an SVG with a number for each matrix and layer.

    Args:
      values: as for `lorax.analysis.layer_map`.
      title: of the figure.
    """
    found = analysis.layer_map(values)
    rows, columns = found.values.shape
    figure, axes = _figure(2.6 + 0.36 * max(columns, 6), 0.9 + 0.26 * rows)
    axes.set_facecolor("0.9")  # where a layer has no such matrix
    axes.imshow(found.values, cmap="Blues", aspect="auto", vmin=0)
    top = np.nanmax(found.values)
    for row, column in np.ndindex(rows, columns):
        value = found.values[row, column]
        if np.isfinite(value):
            ink = "white" if value > 0.6 * top else "black"
            place = {"ha": "center", "va": "center", "fontsize": 7, "color": ink}
            axes.text(column, row, f"{value:.3g}", **place)
    axes.set_yticks(range(rows), found.matrices)
    axes.set_xticks(range(columns), [str(layer) for layer in found.layers])
    axes.set_xlabel("layer")
    axes.set_title(title, loc="left", fontsize=10)
    return _svg(figure)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib.figure  # imported here: slow

    figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Any) -> str:
    """Returns the text of an SVG that can be embedded in a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
