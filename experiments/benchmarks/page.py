"""Writes `docs/performance.md` from the JSON files of the benchmarks.

    python -m experiments.benchmarks.page

It reads the files of `PARTS` that are in `docs/results/benchmarks`; nothing is pasted
by hand. Each processor has its own file of `frameworks`, because the libraries are
tuned for different processors.
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

An adapted step costs as much as hand-written LoRA. This page compares whole steps with
PEFT and others. [What the parts cost](results/costs.md) covers the adapters, DoRA's
magnitudes, populations, optimisers, decoding and attention;
[quantised bases](results/quantized.md) have their own page.

Written by `python -m experiments.benchmarks.page` from the JSON files in
`docs/results/benchmarks`. What is compared, and what differs, is explained at the top
of `experiments/benchmarks/frameworks.py` and `scaling_cost.py`.
"""

SUMMARY = """## In short

The figures are lorax's time for a train step (forward, backward, AdamW) over the other
program's, best of all rounds; below 1, lorax is faster. On a CPU, it depends on the
processor: on Intel the backward pass of the model itself is slower in XLA, not the
adapters. For every program, malloc keeps what a step frees, as `experiments.main` sets
it. Our goal was 1.0 against PEFT.
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
"""Label of a row -> the program's names in the JSON files."""

METHODS = {
    "lora": "LoRA",
    "dora": "DoRA",
    "adalora": "AdaLoRA",
    "full": "full",
    "none": "no adapters",
}

GPU = """A randomly initialised model with the shape of Llama 3.2 1B, in bfloat16; 8
sequences of 2,048 random tokens, rank 16 on every linear kernel, AdamW. PEFT runs as
Hugging Face's Trainer does with `bf16=True`, with torch's fused attention and AdamW;
both programs start from the same files. MFU counts the operations that the model needs
(`sizes.py`: no recomputation, half of causal attention) over the card's dense bfloat16
peak, 989 TFLOP/s. Memory is torch's peak, or the arguments and temporaries that XLA
counts."""


def summary(results: dict[str, dict[str, Any]]) -> str:
    """Returns markdown: a row for each program and processor, a column per method.

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
    """Returns the ratio of best times to the first of the programs that ran."""
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
        "The same with malloc's defaults, and a page fault for most of a step's memory",
        _frameworks,
    ),
    "scaling": ("Cost of adapters by rank, width, depth and number", _scaling),
}
"""Name of a JSON file -> (title, text)."""


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
