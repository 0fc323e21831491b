"""Writes `docs/performance.md` from the JSON files of the benchmarks.

    python -m experiments.benchmarks.page

It reads those of `PARTS` that are in `docs/results/benchmarks`; nothing is pasted by
hand. Each processor has its own file of `frameworks`, because their libraries favour
one or another.
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

DOCS = pathlib.Path(__file__).parents[2] / "docs"
FOLDER = DOCS / "results" / "benchmarks"

HEAD = """# Performance

An adapted step costs what hand-written LoRA costs. This page has whole steps, beside
PEFT and others. [What the parts cost](results/costs.md) has the adapters, DoRA's
magnitudes, populations, optimisers, decoding and attention;
[quantised bases](results/quantized.md) have a page of their own.

Written by `python -m experiments.benchmarks.page` from the JSON files in
`docs/results/benchmarks`. What is compared with what, and what differs, stands at the
top of `experiments/benchmarks/frameworks.py` and `scaling_cost.py`.
"""

SUMMARY = """## In short

The time of a train step (forward, backward, AdamW) over the other program's, best of
all rounds; below 1 lorax is faster. On a CPU the processor decides: on Intel it is
XLA's backward pass of the model itself that falls behind, not the adapters. Malloc
keeps what a step frees, for every program, as `experiments.main` sets it. Our aim was
1.0 beside PEFT.
"""

PROCESSORS = {
    "frameworks_amd": "AMD EPYC",
    "frameworks_intel_kept_memory": "Intel Xeon",
}
RIVALS = {
    "PEFT + PyTorch": ("PEFT + PyTorch", "PyTorch"),
    "`flax.nnx.LoRA`": ("flax.nnx.LoRA",),
    "qwix": ("qwix",),
}
"""Label of a row -> the names under which the program stands in the JSON files."""

METHODS = {
    "lora": "LoRA",
    "dora": "DoRA",
    "adalora": "AdaLoRA",
    "full": "full",
    "none": "no adapters",
}

GPU = """A model of the shape of Llama 3.2 1B, drawn, in bfloat16; 8 sequences of 2,048
random tokens, rank 16 on every linear kernel, AdamW. PEFT runs as Hugging Face's
Trainer does with `bf16=True`, with torch's fused attention and AdamW; both programs
start from the same files. MFU counts the operations that the model needs (`sizes.py`:
no recomputation, half of causal attention) over the card's dense bfloat16 peak, 989
TFLOP/s. Memory is torch's peak, or the arguments and temporaries that XLA counts."""


def summary(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row for each other program and processor, a column for each method.

    Args:
      results: of `frameworks`, by the name of the JSON file.
    """
    rows = []
    for label, names in RIVALS.items():
        for file, processor in PROCESSORS.items():
            if file in results:
                steps = results[file]["steps"]
                ratios = [_ratio(steps[method]["seconds"], names) for method in METHODS]
                rows.append([f"{label}, {processor}", *ratios])
    header = ["lorax's time / the other's", *METHODS.values()]
    return f"{SUMMARY}\n{tables.markdown(header, rows)}\n"


def _ratio(seconds: dict[str, list[float]], names: Sequence[str]) -> str:
    """The best times' ratio to the first of the programs that ran."""
    for name in names:
        if name in seconds:
            return f"{min(seconds['lorax']) / min(seconds[name]):.2f}"
    return ""


def _frameworks(result: dict[str, Any]) -> str:
    steps = result["steps"]
    off = ", ".join(f"{name} {each['deviation']:.0e}" for name, each in steps.items())
    parts = [frameworks.table(steps), f"Gradients agree to: {off}."]
    if "profile" in result:
        parts.append(f"Where the time goes:\n\n{profiles.table(result['profile'])}")
    return "\n\n".join(parts)


def _scaling(result: dict[str, Any]) -> str:
    figure = "![With adapters / without, by size](results/benchmarks/scaling.png)"
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


def write(
    folder: pathlib.Path = FOLDER, page: pathlib.Path = DOCS / "performance.md"
) -> pathlib.Path:
    """Writes the page from the JSON files of the folder and returns its path."""
    found = {name: folder / f"{name}.json" for name in PARTS}
    results = {
        name: json.loads(path.read_text())
        for name, path in found.items()
        if path.exists()
    }
    parts = [HEAD, summary(results)]
    for name, result in results.items():
        title, text = PARTS[name]
        caption = tables.caption(result["about"])
        parts.append(f"## {title}\n\n{caption}\n\n{text(result)}\n")
    page.write_text("\n".join(parts))
    return page


def main(argv: Sequence[str]) -> None:
    """Writes the page."""
    del argv
    print(write())


if __name__ == "__main__":
    app.run(main)
