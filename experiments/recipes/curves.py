"""Figures of a run, drawn without a display and readable without colour."""

import pathlib
from collections.abc import Sequence
from typing import Any

from experiments.machine import disk
from experiments.trainer import metrics

# Okabe and Ito's colour-blind-safe palette; markers distinguish the runs in grey.
STYLE = {"lora": ("#0072B2", "o", "LoRA"), "full": ("#D55E00", "s", "full fine-tuning")}
DARK = {"lora": "#56B4E9", "full": "#E69F00"}
"""The palette's lighter colours, for a dark page."""

INK = {False: "#24292f", True: "#d0d7de"}
"""Colours of text and axes, on a light page and on a dark one."""


def draw_curves(
    rows: Sequence[dict[str, Any]], base: float, folder: str | pathlib.Path
) -> None:
    """Draws bits per byte by step: training as thin lines, held-out with markers.

    Writes `curves.svg` and, for a dark page, `curves-dark.svg`. Both are transparent.

    Args:
      rows: the lines of `metrics.jsonl`; those with `loss` (in nats) or `test_bpb` are
        drawn.
      base: bits per byte of the model before adaptation, drawn as a dashed line.
      folder: where to write the figures.
    """
    for dark, name in ((False, "curves.svg"), (True, "curves-dark.svg")):
        figure = _figure(rows, base, dark)
        path = pathlib.Path(folder) / name
        with disk.failing(path):
            figure.savefig(path, transparent=True, metadata={"Date": None})


def _figure(rows: Sequence[dict[str, Any]], base: float, dark: bool) -> Any:
    """Returns the figure for one kind of page; small, so that its text stays large."""
    import matplotlib.figure  # imported here: slow, and an optional extra
    from matplotlib import ticker

    figure = matplotlib.figure.Figure(figsize=(5.2, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(base, color=INK[dark], ls="--", lw=1, label="base")
    for run, (colour, marker, label) in STYLE.items():
        mine = [row for row in rows if row["run"] == run]
        look: dict[str, Any] = {"color": DARK[run] if dark else colour}
        train = [(r["step"], r["loss"] * metrics.BITS) for r in mine if r.get("loss")]
        axes.plot(*zip(*train, strict=True), alpha=0.6, lw=1, **look)
        test = [(r["step"], r["test_bpb"]) for r in mine if r.get("test_bpb")]
        points = zip((0, base), *test, strict=True)
        axes.plot(*points, marker=marker, lw=2, label=label, **look)
    axes.plot([], [], color=INK[dark], alpha=0.6, lw=1, label="in training")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.set_xlabel("step of adaptation")
    axes.set_ylabel("bits per byte, held out")
    _paint(axes, INK[dark])
    return figure


def _paint(axes: Any, ink: str) -> None:
    """Puts the legend above the lines, and everything but the lines in one colour."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(ink)
    axes.tick_params(colors=ink, labelsize=11)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=ink, fontsize=12)
    axes.legend(
        frameon=False, labelcolor=ink, fontsize=11, ncols=2,
        loc="lower center", bbox_to_anchor=(0.5, 1.0),
    )  # fmt: skip
