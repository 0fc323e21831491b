"""AdaLoRA against LoRA at equal budgets of rank.

LoRA gives every matrix rank r; AdaLoRA starts at 1.5 r and ends with r on average,
where it thinks them needed. The scale stays what LoRA's is at r = 8.

References:
  Zhang et al., AdaLoRA, arXiv:2303.10512, tables 1 and 2, figure 3 (the rank map).
"""

from typing import Any

import numpy as np

from experiments.studies.method import panels, shared, text
from lorax import analysis, optim

BUDGETS = (2, 4, 8)
MATRICES = 13  # six in each of two layers, and the head
STEPS = 90


def _lora(rank: int) -> dict[str, Any]:
    return {"adapter.rank": rank, "adapter.alpha": 2.0 * rank}


def _adalora(rank: int) -> dict[str, Any]:
    start = 3 * rank // 2
    budget: dict[str, Any] = {
        "target_budget": rank * MATRICES,
        "initial_warmup": STEPS // 10,
    }
    budget |= {"final_steps": STEPS // 3, "interval": 3}
    # Part of the config, so that runs of another default are never taken for these.
    budget |= {"orthogonal_form": "decoupled", "orthogonal_weight": 0.3}
    fields = {"adapter.adapter": "adalora", "optimizer.wrap": (("adalora", budget),)}
    return {**_lora(start), **fields}


def watch(setting: shared.Setting, chosen: Any) -> Any:
    """The effective ranks of an AdaLoRA at the step."""
    del setting, chosen

    def ranks(seed: int, step: int, state: Any, params: Any) -> dict[str, Any]:
        if not any(type(a).__name__ == "AdaLora" for a in state.adapters.values()):
            return {}
        found = optim.adalora_effective_ranks(state.opt_state)
        return {path: np.asarray(value).tolist() for path, value in found.items()}

    return ranks


STUDY = text.Study(
    "budgets",
    "Does AdaLoRA make more of the same budget of rank?",
    {
        **{f"LoRA r = {r}": _lora(r) for r in BUDGETS},
        **{f"AdaLoRA r = {r}": _adalora(r) for r in BUDGETS},
    },
    "LoRA r = 4",
    # its singular values start at zero and learn by a larger rate
    grids={f"AdaLoRA r = {r}": tuple(10**0.5 * g for g in text.GRID) for r in BUDGETS},
    steps=STEPS,
    watch=watch,
)
PAIRS = tuple((f"AdaLoRA r = {r}", f"LoRA r = {r}") for r in BUDGETS)
"""Further pairs that the table holds against each other."""


def by_budget(axis: Any, results: Any) -> None:
    """The final value by budget."""
    arms = {
        method: lambda r, method=method: f"{method} r = {r}"
        for method in ("LoRA", "AdaLoRA")
    }
    panels.by_size(axis, results, BUDGETS, arms)
    axis.set(xlabel="average rank of a matrix at the end")


def rank_map(axis: Any, results: Any) -> None:
    """Where the ranks of the largest budget ended, mean over seeds."""
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
