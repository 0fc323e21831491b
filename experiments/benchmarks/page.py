"""Writes `docs/results/benchmarks/README.md` from what the benchmarks left there.

    python -m experiments.benchmarks.page

Of the JSON files in `PARTS`, those that are there; nothing is pasted by hand. A
processor has its own file of `frameworks`, as their libraries favour one or another.
"""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from absl import app

from experiments.benchmarks import frameworks, scaling_cost
from experiments.benchmarks.gpu import table as gpu
from experiments.benchmarks.rivals import profiles
from experiments.machine import tables

FOLDER = pathlib.Path(__file__).parents[2] / "docs" / "results" / "benchmarks"

HEAD = """# Benchmarks

Written by `python -m experiments.benchmarks.page` from the JSON files beside it. What
is compared with what, and what differs, is told at the top of
`experiments/benchmarks/frameworks.py` and `scaling_cost.py`.
"""


GPU = """A model of the shape of Llama 3.2 1B, drawn, in bfloat16; 8 sequences of 2,048
random tokens, rank 16 on every linear kernel, AdamW. PEFT runs as Hugging Face's
Trainer does with `bf16=True`, with torch's fused attention and AdamW; both programs
start from the same files. MFU counts the operations that the model needs (`sizes.py`:
no recomputation, half of causal attention) over the card's dense bfloat16 peak, 989
TFLOP/s. Memory is torch's peak, or the arguments and temporaries that XLA counts."""


def _frameworks(result: dict[str, Any]) -> str:
    steps = result["steps"]
    off = ", ".join(f"{name} {each['deviation']:.0e}" for name, each in steps.items())
    parts = [frameworks.table(steps), f"Gradients agree to: {off}."]
    if "profile" in result:
        parts.append(f"Where the time goes:\n\n{profiles.table(result['profile'])}")
    return "\n\n".join(parts)


def _scaling(result: dict[str, Any]) -> str:
    figure = "![A step with adapters / without, by size](scaling.png)"
    return f"{figure}\n\n{scaling_cost.table(result['rows'])}"


def _gpu(result: dict[str, Any]) -> str:
    return f"{GPU}\n\n{gpu.render(result)}"


PARTS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "gpu": ("On one GPU, beside PEFT", _gpu),
    "frameworks_amd": ("A train step of several frameworks, AMD EPYC", _frameworks),
    "frameworks_intel_kept_memory": (
        "A train step of several frameworks, Intel Xeon, malloc keeping the memory",
        _frameworks,
    ),
    "frameworks_intel": (
        "The same as malloc is, with a page fault for most of a step's memory",
        _frameworks,
    ),
    "scaling": ("Cost of adapters by rank, width, depth and number", _scaling),
}
"""Title and text by the name of a JSON file."""


def write(folder: pathlib.Path = FOLDER) -> pathlib.Path:
    """Writes the page into the folder of the JSON files and returns its path."""
    parts = [HEAD]
    for name, (title, text) in PARTS.items():
        path = folder / f"{name}.json"
        if path.exists():
            result = json.loads(path.read_text())
            caption = tables.caption(result["about"])
            parts.append(f"## {title}\n\n{caption}\n\n{text(result)}\n")
    page = folder / "README.md"
    page.write_text("\n".join(parts))
    return page


def main(argv: Sequence[str]) -> None:
    """Writes the page."""
    del argv
    print(write())


if __name__ == "__main__":
    app.run(main)
