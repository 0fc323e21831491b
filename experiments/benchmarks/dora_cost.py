"""What DoRA's magnitudes cost, compared with plain LoRA.

    python -m experiments.benchmarks.dora_cost --out=dora_cost.json

Prints a markdown table for value and gradient of the GPT-2-shaped model of `adapt_cost`
with respect to all adapters: XLA's count of FLOPs and temporary memory in four variants
(a loop's body counted once), and the time of a step, interleaved with LoRA's. The flags
are those of `adapt_cost`.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from experiments import paired
from experiments.benchmarks import adapt_cost
from experiments.benchmarks.cases import gpt2_shaped as gpt2
from experiments.benchmarks.cases import measure, programs
from experiments.machine import tables, timing


def compare(shape: gpt2.Shape, rounds: int, **switches: Any) -> dict[str, Any]:
    """Returns the cost of a DoRA step over that of the same program's LoRA step."""
    cases = {
        name: programs.adapted(shape, name, **switches) for name in ("lora", "dora")
    }
    steps = {name: measure.compile_step(case) for name, case in cases.items()}
    cost = {name: measure.cost(step) for name, step in steps.items()}
    runners = {name: measure.runner(steps[name], cases[name]) for name in cases}
    seconds = timing.interleave(runners, rounds)
    return {
        "flops": cost["dora"].flops / cost["lora"].flops,
        "temp": cost["dora"].temp / cost["lora"].temp,
        "lora_ms": 1e3 * min(seconds["lora"]),
        "dora_ms": 1e3 * min(seconds["dora"]),
        "paired": paired.ratio(seconds["dora"], seconds["lora"]),
    }


def table(rows: dict[str, dict[str, float]]) -> str:
    """Returns the figures as markdown."""
    header = ["variant", "FLOPs / LoRA", "temp memory / LoRA", "best ms, LoRA"]
    header += ["best ms, DoRA", "median of paired ratios"]
    return tables.markdown(
        header,
        [
            [
                name,
                f"{row['flops']:.3f}",
                f"{row['temp']:.3f}",
                f"{row['lora_ms']:.0f}",
                f"{row['dora_ms']:.0f}",
                f"{row['paired']:.2f}",
            ]
            for name, row in rows.items()
        ],
    )


def main(argv: Sequence[str]) -> None:
    """Runs the four variants and prints the table."""
    del argv
    given = flags.FLAGS
    shape = gpt2.Shape(layers=given.layers, width=given.width, batch=given.batch)
    rows = {
        name: compare(shape, given.rounds, **on)
        for name, on in adapt_cost.VARIANTS.items()
    }
    print(f"{tables.caption(tables.about(('jax',)))}\n\n{table(rows)}")
    if given.out:
        pathlib.Path(given.out).write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    app.run(main)
