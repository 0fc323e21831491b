"""Where the time of a train step goes, measured by leaving parts of it out.

The parts of one framework are interleaved with those of the other. Backward is the
gradient's time minus the forward pass's; the update is the whole step's minus the
gradient's; the adapters are the whole step's minus that of the same model without
adapters (three biases trained). All are medians over rounds. jax's forward pass keeps
nothing for a backward pass, torch's does. AdaLoRA's penalty is part of the update in
lorax, and of the gradient in PEFT.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.cases import gpt2_shaped as gpt2
from experiments.benchmarks.cases import measure, programs
from experiments.benchmarks.rivals import torch_peft, trainers
from experiments.machine import tables, timing

Parts = dict[str, Callable[[], Any]]


def of_lorax(shape: gpt2.Shape, method: str, dtype: Any) -> Parts:
    """Returns lorax's steps with parts left out."""
    case = programs.adapted(shape, method, dtype)
    loss = jax.jit(case.loss).lower(*case.inputs()).compile()
    parts: Parts = {
        "forward": measure.runner(loss, case),
        "gradient": measure.runner(measure.compile_step(case), case),
        "step": trainers.of_lorax(case, shape, method).step,
    }
    if method != "none":
        bare = programs.adapted(shape, "none", dtype)
        parts["bare"] = trainers.of_lorax(bare, shape, "none").step
    return parts


def of_torch(shape: gpt2.Shape, method: str, dtype: Any, device: str) -> Parts:
    """Returns the steps of PEFT + PyTorch with parts left out."""
    import torch

    case = programs.adapted(shape, method, dtype)
    model, trained = torch_peft.adapted(case, shape, method, device)
    tokens = torch.from_numpy(np.array(case.tokens)).long().to(device)

    def gradient() -> None:
        loss = model(tokens).loss
        loss.backward()
        for parameter in trained.values():
            parameter.grad = None
        loss.item()  # waits for the device

    parts: Parts = {
        "forward": lambda: model(tokens).loss.item(),
        "gradient": gradient,
        "step": trainers.of_torch(case, shape, method, device).step,
    }
    if method != "none":
        bare = programs.adapted(shape, "none", dtype)
        parts["bare"] = trainers.of_torch(bare, shape, "none", device).step
    return parts


def measured(
    method: str, shape: gpt2.Shape, dtype: Any, device: str = "cpu", rounds: int = 5
) -> dict[str, dict[str, list[list[float]]]]:
    """Returns `timing.usage` of every part, by framework, part and round."""
    parts = {"lorax": of_lorax(shape, method, dtype)}
    if torch_peft.available():
        parts["PyTorch"] = of_torch(shape, method, dtype, device)
    flat = {(who, part): run for who, own in parts.items() for part, run in own.items()}
    named = {f"{who}/{part}": run for (who, part), run in flat.items()}
    used = timing.interleave(named, rounds, timing.usage)
    return {
        who: {part: np.array(used[f"{who}/{part}"]).tolist() for part in own}
        for who, own in parts.items()
    }


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns markdown in milliseconds, with a row per method and framework."""
    header = ["method, program", "step ms", "forward", "backward", "update"]
    header += ["of which adapters", "CPU time in the kernel", "page faults per step"]
    rows = []
    for method, by in results.items():
        for who, parts in by.items():
            used = {part: np.array(rounds) for part, rounds in parts.items()}
            wall = {part: 1e3 * values[:, 0] for part, values in used.items()}

            def median(values: np.ndarray) -> str:
                return f"{statistics.median(values):.0f}"

            step = used["step"]
            rows.append(
                [
                    f"{method}, {who}",
                    median(wall["step"]),
                    median(wall["forward"]),
                    median(wall["gradient"] - wall["forward"]),
                    median(wall["step"] - wall["gradient"]),
                    median(wall["step"] - wall["bare"]) if "bare" in wall else "-",
                    f"{step[:, 2].sum() / step[:, 1].sum():.0%}",
                    f"{statistics.median(step[:, 3]):,.0f}",
                ]
            )
    return tables.markdown(header, rows)
