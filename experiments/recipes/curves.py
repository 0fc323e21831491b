"""Figures, drawn without a display and readable without colour."""

import pathlib
from collections.abc import Sequence
from typing import Any

from experiments.machine import disk
from experiments.trainer import metrics

# Okabe and Ito's colour-blind-safe palette; the marker tells the runs apart in grey.
STYLE = {"lora": ("#0072B2", "o", "LoRA"), "full": ("#D55E00", "s", "full fine-tuning")}


def draw_curves(
    rows: Sequence[dict[str, Any]], base: float, path: str | pathlib.Path
) -> None:
    """Draws bits per byte against step: training as lines, held out as markers.

    Args:
      rows: the lines of `metrics.jsonl`, of which those with `loss` (nats) and
        `test_bpb` are drawn.
      base: bits per byte of the model before adaptation, a dashed line.
      path: the image to write.
    """
    import matplotlib.figure  # imported here: a second, and an optional extra

    figure = matplotlib.figure.Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for run, (colour, marker, label) in STYLE.items():
        mine = [row for row in rows if row["run"] == run]
        train = [r for r in mine if r.get("loss")]
        axes.plot(
            [r["step"] for r in train],
            [r["loss"] * metrics.BITS for r in train],
            color=colour,
            alpha=0.45,
            lw=1,
            label=f"{label}, training",
        )
        test = [r for r in mine if r.get("test_bpb")]
        axes.plot(
            [0, *(r["step"] for r in test)],
            [base, *(r["test_bpb"] for r in test)],
            color=colour,
            marker=marker,
            lw=1.5,
            label=f"{label}, held out",
        )
    axes.axhline(base, color="0.4", ls="--", lw=1, label="base, held out")
    axes.set_xlabel("adaptation step")
    axes.set_ylabel("loss (bits per byte)")
    axes.set_title("Adapting a model of Python source to the English of its manual")
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.97))
    axes.spines[["top", "right"]].set_visible(False)
    with disk.failing(path):
        figure.savefig(path, dpi=150)
