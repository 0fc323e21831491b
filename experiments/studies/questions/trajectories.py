"""Does LoRA-Pro follow full fine-tuning?

At every tenth step, over the kernels with adapters, with D the change from the base and
D* that of full fine-tuning at its own best rate on the same batches:

    cosine    <D, D*> / |D| |D*|          distance    |D - D*| / |D*|

References:
  Wang et al., LoRA-Pro, arXiv:2407.18242: the pair's step is full fine-tuning's,
  projected.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lorax
from experiments.studies.method import panels, scorecard, shared, text, trial
from lorax import tree

GA = {"adapter.init": "lora_ga", "adapter.options": (("scale", "stable"),)}


def _lora_pro(mode: str, damping: float, b1: float | None) -> dict[str, Any]:
    options = (("mode", mode), ("damping", damping), ("b1", b1))
    return {"optimizer.name": "lora_pro", "optimizer.options": options}


ARMS: dict[str, dict[str, Any]] = {
    "full": {"run.methods": ("full",)},
    "LoRA": {},
    "LoRA-Pro, full": _lora_pro("full", 0.01, None),
    "LoRA-Pro, factor": _lora_pro("factor", 0.1, 0.9),
    "LoRA-Pro, rowcol": _lora_pro("rowcol", 0.01, None),
    "LoRA-Pro, rowcol 0.1 with momentum": _lora_pro("rowcol", 0.1, 0.9),
    "LoRA-GA + LoRA-Pro, factor": {**_lora_pro("factor", 0.1, 0.9), **GA},
}


def watch(setting: shared.Setting, chosen: Any) -> Any:
    """Returns a function: cosine and distance to the same seed's full fine-tuning."""
    references: dict[int, dict[int, Any]] = {}

    def kernels(params: Any) -> jax.Array:
        leaves = tree.flatten(params)
        kept = [leaf for path, leaf in leaves.items() if re.fullmatch(".*kernel", path)]
        return jnp.concatenate([leaf.reshape(-1) for leaf in kept])

    config = text.configured(STUDY, ARMS["full"], setting.toy)
    task = setting.task(config)
    start = kernels(task.base)

    def reference(seed: int) -> dict[int, Any]:
        if seed not in references:
            own: dict[int, Any] = {}

            def keep(seed: int, step: int, state: Any, params: Any) -> None:
                own[step] = kernels(lorax.merge(state.adapters, params)) - start

            run = trial.make_run(
                config, task.loss_fn, task.base, setting.train(config), "full"
            )
            run(seed, chosen["full"], lambda params: 0.0, STUDY.every, keep)
            references[seed] = own
        return references[seed]

    def measure(seed: int, step: int, state: Any, params: Any) -> dict[str, float]:
        own = kernels(lorax.merge(state.adapters, params)) - start
        goal = reference(seed)[step]
        size = jnp.linalg.norm(goal)
        cosine = own @ goal / (jnp.linalg.norm(own) * size)
        return {
            "cosine": float(cosine),
            "distance": float(jnp.linalg.norm(own - goal) / size),
        }

    return measure


LOWER = tuple(rate / 10**0.5 for rate in text.GRID)
"""Rates for full fine-tuning, and for steps of its size."""
STUDY = text.Study(
    "trajectories",
    "Does LoRA-Pro follow full fine-tuning more closely than LoRA does?",
    ARMS,
    "LoRA",
    grids={arm: LOWER for arm in ("full", "LoRA-Pro, full")},
    seeds=(1, 2, 3),
    watch=watch,
)


PANELS = (
    panels.curves,
    panels.watched("cosine", "cosine to full's change", "full"),
    panels.watched("distance", "distance to full's change / its norm", "full"),
)
CLAIMS = (
    scorecard.Lower(
        "LoRA-Pro ends lower than LoRA", "2407.18242", "LoRA-Pro, full", "LoRA"
    ),
)
"""The paper's claim; "full" is its algorithm."""


def claims(results: Any) -> list[scorecard.Claim]:
    """Returns what the paper claims about the losses, and about the changes."""
    found = scorecard.of_arms(results, CLAIMS)
    if not found:
        return []

    def cosines(arm: str, point: int) -> np.ndarray:
        runs = results["arms"][arm]["watched"]
        return np.array([run[point]["cosine"] for run in runs])

    for point, claimed in (
        (0, "LoRA-Pro follows full fine-tuning from the start"),
        (-1, "LoRA-Pro ends closer to full fine-tuning than LoRA does"),
    ):
        step = panels.steps_of(results)[point]
        told = f"cosine of the changes after {step} steps, LoRA-Pro, full minus LoRA"
        off = cosines("LoRA-Pro, full", point) - cosines("LoRA", point)
        number = f"{told}; byte model"
        found.append(scorecard.Claim(claimed, "2407.18242", number, off, low=0.0))
    return found
