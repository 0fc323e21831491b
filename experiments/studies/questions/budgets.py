"""AdaLoRA against LoRA at equal budgets of rank.

LoRA gives every matrix rank r; AdaLoRA starts at 1.5 r and ends with r on average,
distributed as it sees fit. The scale is LoRA's at r = 8 throughout. At r = 4 the
penalty's form and the interval between choices vary, one at a time: the default pulls p
and q to orthonormality after Adam's step, "released" adds the authors' 0.1 of the mean
norm to the loss.

References:
  Zhang et al., AdaLoRA, arXiv:2303.10512, tables 1 and 2, figure 3 (the rank map).
"""

from typing import Any

import numpy as np

from experiments.studies.method import panels, scorecard, shared, text
from lorax import analysis, optim

PAPER = "2303.10512"
BUDGETS = (2, 4, 8)
MATRICES = 13  # six in each of two layers, and the head
STEPS = 90
PENALTIES = {
    "default": ("decoupled", 0.3),
    "no penalty": ("decoupled", 0.0),
    "released": ("norm", 0.1),
}
"""Name -> (form, weight)."""


def lora(rank: int) -> dict[str, Any]:
    """Returns the fields of a LoRA arm."""
    return {"adapter.rank": rank, "adapter.alpha": 2.0 * rank}


def adalora(
    rank: int, penalty: str = "default", interval: int = 3, steps: int = STEPS
) -> dict[str, Any]:
    """Returns the fields of an AdaLoRA arm.

    Args:
      rank: the average at the end.
      penalty: a name in PENALTIES.
      interval: steps between two choices of triplets.
      steps: of the run.
    """
    form, weight = PENALTIES[penalty]
    budget: dict[str, Any] = {
        "target_budget": rank * MATRICES,
        "initial_warmup": steps // 10,
        "final_steps": steps // 3,
        "interval": interval,
    }
    # Part of the config, so that runs with another default never count as these.
    budget |= {"orthogonal_form": form, "orthogonal_weight": weight}
    fields = {"adapter.adapter": "adalora", "optimizer.wrap": (("adalora", budget),)}
    return {**lora(3 * rank // 2), **fields}


def watch(setting: shared.Setting, chosen: Any) -> Any:
    """Returns a function that reads AdaLoRA's effective ranks at a step."""
    del setting, chosen

    def ranks(seed: int, step: int, state: Any, params: Any) -> dict[str, Any]:
        if not any(type(a).__name__ == "AdaLora" for a in state.adapters.values()):
            return {}
        found = optim.adalora_effective_ranks(state.opt_state)
        return {path: np.asarray(value).tolist() for path, value in found.items()}

    return ranks


VARIANTS = {
    "AdaLoRA r = 4, no penalty": adalora(4, "no penalty"),
    "AdaLoRA r = 4, released": adalora(4, "released"),
    "AdaLoRA r = 4, interval 10": adalora(4, interval=10),
    "AdaLoRA r = 4, interval 30": adalora(4, interval=30),
}
"""Arms that differ from "AdaLoRA r = 4" in one thing."""
ARMS = {
    **{f"LoRA r = {r}": lora(r) for r in BUDGETS},
    **{f"AdaLoRA r = {r}": adalora(r) for r in BUDGETS},
    **VARIANTS,
}
# AdaLoRA's singular values start at zero and need a larger rate
HIGHER = tuple(10**0.5 * rate for rate in text.GRID)
STUDY = text.Study(
    "budgets",
    "Does AdaLoRA make more of the same budget of rank?",
    ARMS,
    "LoRA r = 4",
    grids={arm: HIGHER for arm in ARMS if arm.startswith("AdaLoRA")},
    steps=STEPS,
    watch=watch,
)
PAIRS = (
    *((f"AdaLoRA r = {r}", f"LoRA r = {r}") for r in BUDGETS),
    *((arm, "AdaLoRA r = 4") for arm in VARIANTS),
)
"""Further pairs that the page compares."""

CLAIMS = (
    *(
        scorecard.Lower(
            "At an equal rank budget, AdaLoRA learns more than LoRA",
            PAPER,
            f"AdaLoRA r = {r}",
            f"LoRA r = {r}",
        )
        for r in BUDGETS
    ),
    scorecard.Lower(
        "The penalty helps AdaLoRA",
        PAPER,
        "AdaLoRA r = 4, released",
        "AdaLoRA r = 4, no penalty",
    ),
)
"""The paper's claims."""


def by_budget(axis: Any, results: Any) -> None:
    """Draws the final value by budget."""
    arms = {
        method: lambda r, method=method: f"{method} r = {r}"
        for method in ("LoRA", "AdaLoRA")
    }
    panels.by_size(axis, results, BUDGETS, arms)
    axis.set(xlabel="average rank of a matrix at the end")


def rank_map(axis: Any, results: Any) -> None:
    """Draws where the ranks of the largest budget ended, as the mean over seeds."""
    arms = [
        f"AdaLoRA r = {r}" for r in BUDGETS if f"AdaLoRA r = {r}" in results["arms"]
    ]
    if not arms:
        axis.set(title="no AdaLoRA run is there")
        return
    last = [watched[-1] for watched in results["arms"][arms[-1]]["watched"]]
    mean = {path: np.mean([own[path] for own in last], 0) for path in last[0]}
    found = analysis.layer_map(mean)
    image = axis.imshow(found.values, cmap="cividis", aspect="auto")
    axis.set_yticks(range(len(found.matrices)), found.matrices, fontsize=7)
    axis.set_xticks(range(len(found.layers)), map(str, found.layers))
    axis.set(xlabel="layer", title=arms[-1])
    axis.figure.colorbar(image, ax=axis, label="rank at the end")


PANELS = (by_budget, rank_map)


def claims(results: Any) -> list[scorecard.Claim]:
    """Returns what the paper claims about the arms."""
    return scorecard.of_arms(results, CLAIMS)
