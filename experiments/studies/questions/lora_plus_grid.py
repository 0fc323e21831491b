"""LoRA against LoRA+ over the grid of both learning rates.

The claim: at large width the best pair (lr_A, lr_B) lies off the diagonal, at
lr_B >> lr_A. Here each ratio is an arm with its own learning rates, so the table
compares each ratio's best with LoRA's best, and the map shows all pairs that were run.

References:
  Hayou et al., LoRA+, arXiv:2402.12354, figures 2 to 4.
"""

from typing import Any

from experiments.studies.method import panels, text

RATIOS = (1 / 4, 4, 16, 64)


def arm(ratio: float) -> dict[str, Any]:
    """Returns the fields of LoRA+ at a ratio."""
    return {"optimizer.name": "lora_plus", "optimizer.options": (("ratio", ratio),)}


def grid(ratio: float) -> tuple[float, ...]:
    """Returns rates of a for which the geometric mean of both is LoRA's grid."""
    return tuple(rate / ratio**0.5 for rate in text.GRID)


STUDY = text.Study(
    "lora_plus_grid",
    "Is the best pair of learning rates of a and b off the diagonal?",
    {"LoRA": {}, **{f"ratio {ratio:g}": arm(ratio) for ratio in RATIOS}},
    "LoRA",
    grids={f"ratio {ratio:g}": grid(ratio) for ratio in RATIOS},
)


def heat(axis: Any, results: Any) -> None:
    """Draws all pairs that were run, coloured by their score on the selection split."""
    points = []
    for arm, found in results["arms"].items():
        ratio = 1.0 if arm == "LoRA" else float(arm.split()[1])
        points += [(float(r), ratio * float(r), v) for r, v in found["grid"].items()]
    best = min(value for *_, value in points)
    a, b, value = zip(*points, strict=True)
    shown = [
        min(v, best + 0.15) for v in value
    ]  # diverged runs would wash out the rest
    made = axis.scatter(a, b, c=shown, cmap="cividis_r", s=90, edgecolors="black")
    axis.figure.colorbar(made, ax=axis, label="bits per byte (selection)")
    low, high = min(a), max(a)
    axis.plot(
        [low, high], [low, high], color="black", linewidth=0.7, label="LoRA: equal"
    )
    winner = points[value.index(best)]
    axis.plot(*winner[:2], "r*", markersize=9, label="best")
    axis.set(xscale="log", yscale="log", xlabel="learning rate of a")
    axis.set(ylabel="learning rate of b")
    axis.legend(fontsize=7)


PANELS = (heat, panels.curves)
