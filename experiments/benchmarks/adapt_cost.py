"""What adaptation costs: `lorax.adapt` against hand-written LoRA.

    python -m experiments.benchmarks.adapt_cost --out=adapt_cost.json

Prints three markdown tables for the gradient of a GPT-2-shaped model's loss with
respect to the adapters: XLA's count of FLOPs and temporary memory in four variants
(plain, `nn.scan`, `nn.remat`, both), the time to trace and compile, and the time of a
step. All programs must agree in loss and gradients (`measure.agree_alike`) before
anything is reported.

On Linux, XLA:CPU maps and unmaps its temporary memory at every call, and spends part of
every step on page faults; `frameworks` has the malloc setting that keeps the memory.
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import app, flags

from experiments import paired
from experiments.benchmarks.cases import gpt2_shaped as gpt2
from experiments.benchmarks.cases import measure, programs
from experiments.benchmarks.rivals import torch_peft
from experiments.machine import tables, timing

_LAYERS = flags.DEFINE_integer("layers", 6, "Layers of the model.", lower_bound=2)
_WIDTH = flags.DEFINE_integer("width", 512, "Width of the model, a multiple of 8.")
_BATCH = flags.DEFINE_integer("batch", 8, "Sequences in a batch, of 128 tokens each.")
_ROUNDS = flags.DEFINE_integer("rounds", 15, "Interleaved rounds of timed steps.")
_BUILDS = flags.DEFINE_integer("builds", 3, "Interleaved rounds of compilations.")
_THREADS = flags.DEFINE_integer("threads", 2, "CPU cores for both XLA and torch.")
_OUT = flags.DEFINE_string("out", None, "Where to write every figure as JSON.")

VARIANTS = {
    "+".join(name for name in ("scan", "remat") if on[name]) or "plain": on
    for on in (
        {"scan": scan, "remat": remat}
        for remat, scan in itertools.product((False, True), repeat=2)
    )
}


def cases(shape: gpt2.Shape, **switches: Any) -> dict[str, programs.Case]:
    """Returns the three programs of one variant."""
    adapted = programs.adapted(shape, **switches)
    return {
        "lorax": adapted,
        "hand-written": programs.by_hand(adapted, shape, **switches),
        "materialised": programs.materialised(adapted, shape, **switches),
    }


def compile_checked(made: Mapping[str, programs.Case]) -> dict[str, Any]:
    """Compiles programs; raises unless they agree in loss and gradients."""
    compiled = {name: measure.compile_step(case) for name, case in made.items()}
    results = {}
    for name, case in made.items():
        loss, grads = compiled[name](*case.inputs())
        results[name] = loss, programs.nested(grads) if name == "lorax" else grads
    measure.agree_alike(results, programs.in_float64(made["materialised"]))
    return compiled


def counts(shape: gpt2.Shape) -> dict[str, Any]:
    """Returns XLA's own FLOPs and temporary bytes, by variant and program.

    XLA counts a loop's body once. Unrolled by two it is counted twice, so the
    difference is one layer, and `total_flops` is the count for all iterations.
    """
    table: dict[str, Any] = {}
    for variant, on in VARIANTS.items():
        twice = cases(shape, **on, unroll=2) if on["scan"] else {}
        for name, compiled in compile_checked(cases(shape, **on)).items():
            flops, temp = measure.cost(compiled)
            row = {"flops": flops, "temp_bytes": temp, "total_flops": flops}
            if on["scan"]:
                layer = measure.cost(measure.compile_step(twice[name])).flops - flops
                row |= {"layer_flops": layer}
                row["total_flops"] += layer * (shape.layers - 1)
            table.setdefault(variant, {})[name] = row
    return table


def builds(shape: gpt2.Shape, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Returns CPU seconds to trace, lower and compile, by variant and program."""
    table = {}
    for variant, on in VARIANTS.items():
        made = cases(shape, **on)
        builders = {
            name: measure.builder(made[name]) for name in ("lorax", "hand-written")
        }
        table[variant] = timing.interleave(builders, rounds, time.process_time)
    return table


def steps(shape: gpt2.Shape, rounds: int, threads: int) -> dict[str, list[float]]:
    """Returns seconds per step of the plain variant, by program."""
    made = cases(shape)
    compiled = compile_checked(made)
    made["no adapter term"] = programs.frozen(made["lorax"], shape)
    compiled["no adapter term"] = measure.compile_step(made["no adapter term"])
    runners: dict[str, Any] = {
        name: measure.runner(step, made[name]) for name, step in compiled.items()
    }
    if torch_peft.available():
        runners["PEFT + PyTorch"] = torch_peft.step(made["lorax"], shape, threads)

        def factors(adapters: Mapping[str, Any]) -> dict[str, Any]:
            return {k: (own.a, own.b) for k, own in adapters.items()}

        def read(loss: Any, grads: Any) -> tuple[Any, Any]:
            return (loss, factors(grads))

        loss, grads = runners["PEFT + PyTorch"]()
        theirs = {path: (a.numpy(), b.numpy()) for path, (a, b) in grads.items()}
        found = {"lorax": read(*runners["lorax"]()), "PEFT + PyTorch": (loss, theirs)}
        measure.agree_alike(found, read(*programs.in_float64(made["lorax"])))
    return timing.interleave(runners, rounds)


def count_table(table: Mapping[str, Any], layers: int) -> str:
    """Returns FLOPs and memory as markdown."""
    header = ["variant", "GFLOPs", "/ hand-written", "/ materialised"]
    header += ["one layer x trips, GFLOPs", "/ materialised, all trips"]
    header += ["temp MB", "temp / hand-written"]
    rows = []
    for variant, by in table.items():
        own, hand, dense = by["lorax"], by["hand-written"], by["materialised"]
        layer = own.get("layer_flops")
        rows.append(
            [
                variant,
                f"{own['flops'] / 1e9:.2f}",
                f"{own['flops'] / hand['flops']:.4f}",
                f"{own['flops'] / dense['flops']:.3f}",
                f"{layer / 1e9:.2f} x {layers}" if layer else "-",
                f"{own['total_flops'] / dense['total_flops']:.3f}",
                f"{own['temp_bytes'] / 1e6:.0f}",
                f"{own['temp_bytes'] / hand['temp_bytes']:.3f}",
            ]
        )
    return tables.markdown(header, rows)


def build_table(table: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Returns compile times as markdown."""
    header = ["trace + compile", "lorax CPU s", "hand-written CPU s", "ratio of best"]
    rows = []
    for variant, by in table.items():
        own, hand = min(by["lorax"]), min(by["hand-written"])
        rows.append([variant, f"{own:.2f}", f"{hand:.2f}", f"{own / hand:.2f}"])
    return tables.markdown(header, rows)


def step_table(table: Mapping[str, Sequence[float]]) -> str:
    """Returns step times as markdown."""
    header = ["step", "best ms", "median ms", "range ms"]
    header += ["best / no adapter term", "median of paired ratios"]
    bare, rows = table["no adapter term"], []
    for name, seconds in sorted(table.items(), key=lambda item: min(item[1])):
        ms = [1e3 * s for s in seconds]
        rows.append(
            [
                name,
                f"{min(ms):.0f}",
                f"{statistics.median(ms):.0f}",
                f"{min(ms):.0f}-{max(ms):.0f}",
                f"{min(seconds) / min(bare):.2f}",
                f"{paired.ratio(seconds, bare):.2f}",
            ]
        )
    return tables.markdown(header, rows)


def pin(threads: int) -> None:
    """Pins this process to `threads` cores; call it before XLA counts its threads."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))[:threads]
        os.sched_setaffinity(0, cores)


def main(argv: Sequence[str]) -> None:
    """Runs everything and prints the tables."""
    del argv
    pin(_THREADS.value)
    jax.config.update("jax_enable_compilation_cache", False)
    shape = gpt2.Shape(layers=_LAYERS.value, width=_WIDTH.value, batch=_BATCH.value)
    facts = tables.about(("jax", "torch", "peft"))
    result: dict[str, Any] = {"about": facts}
    print(tables.caption(facts) + "\n", flush=True)
    result["counts"] = counts(shape)
    print(count_table(result["counts"], shape.layers), flush=True)
    result["builds"] = builds(shape, _BUILDS.value)
    print("\n" + build_table(result["builds"]), flush=True)
    result["steps"] = steps(shape, _ROUNDS.value, _THREADS.value)
    print("\n" + step_table(result["steps"]), flush=True)
    if _OUT.value:
        pathlib.Path(_OUT.value).write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    app.run(main)
