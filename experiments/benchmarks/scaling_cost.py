"""How the cost of adapters grows with rank, width, depth and their number.

    python -m experiments.benchmarks.scaling_cost --builds=2 --out=scaling.json \
        --figure=scaling.png

A train step (forward, backward, AdamW) of a GPT-2-shaped model with LoRA on the linears
of its blocks, compared with the same program without adapters, in which three biases
are trained so that the backward pass crosses the same activations. It reports XLA's own
counts, which are free of noise: FLOPs, bytes of temporaries and of arguments
(parameters, adapters, moments, batch); the CPU seconds to trace and compile, best of
`--builds`; and how many programs two steps compile, the second with other factors.

"adapters" is a batch whose examples take turns in a stack of that many adapters, with
`lorax.compose.route`, and all adapters train; in the second step, every example gets
another adapter.

One thing is varied at a time; the others stay at `BASE`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments.benchmarks import adapt_cost
from experiments.benchmarks.cases import gpt2_shaped as gpt2
from experiments.benchmarks.cases import measure, programs
from experiments.benchmarks.rivals import trainers
from experiments.machine import tables
from lorax import compose

# Beside those of adapt_cost: --builds, --threads, --out.
_FIGURE = flags.DEFINE_string("figure", None, "Where to draw the ratios, a PNG.")

BASE = gpt2.Shape(layers=4, width=128, heads=4, batch=16, time=64, rank=8)
SWEEPS: dict[str, Sequence[int]] = {
    "rank": (1, 2, 4, 8, 16, 32, 64),
    "width": (64, 128, 256, 512),
    "depth": (1, 2, 4, 8),
    "adapters": (1, 2, 4, 8, 16),
}
LABELS = {
    "rank": "rank of every adapter",
    "width": "width (features)",
    "depth": "depth (layers)",
    "adapters": "adapters in the stack",
}
MEASURES = {
    "flops": "FLOPs",
    "temp_bytes": "temporary memory",
    "argument_bytes": "arguments",
    "build_seconds": "trace + compile, CPU time",
}

TICKS = (1, 1.25, 1.5, 2, 3, 4, 5)


class Point(NamedTuple):
    """A program and the two batches on which it runs."""

    case: programs.Case
    batches: tuple[Any, Any]


def point(sweep: str, value: int, base: gpt2.Shape) -> tuple[Point, gpt2.Shape]:
    """Returns the adapted program at one value, and its sizes."""
    if sweep == "adapters":
        return routed(value, base), base
    field = {"depth": "layers"}.get(sweep, sweep)
    shape = dataclasses.replace(base, **{field: value})
    return _single(programs.adapted(shape)), shape


def _single(case: programs.Case) -> Point:
    return Point(case, (case.tokens, case.tokens))


def routed(count: int, shape: gpt2.Shape) -> Point:
    """Returns the mean loss of examples with one of `count` adapters each."""
    case, model = programs.adapted(shape), gpt2.Gpt2(shape)

    def one(params: Any, tokens: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, tokens[None, :-1])
        return gpt2.cross_entropy(logits, tokens[None])

    route = compose.route(one, on_merge="error")

    def loss(stacked: Any, params: Any, batch: Any) -> jax.Array:
        index, tokens = batch
        return route(stacked, index, params, tokens).mean()

    stacked = compose.stack([case.trained] * count)
    index = jnp.arange(shape.batch) % count
    batches = (index, case.tokens), ((index + 1) % count, case.tokens)
    return Point(case._replace(loss=loss, trained=stacked), batches)


def measured(at: Point, builds: int) -> dict[str, float]:
    """Measures everything for one program."""
    best = float("inf")
    for _ in range(builds):
        traces: list[int] = []
        jitted, state = _counted(at.case, traces)
        inputs = at.case.params, at.batches[0]
        jax.clear_caches()
        began = time.process_time()
        compiled = jitted.lower(state, *inputs).compile()
        best = min(best, time.process_time() - began)
    memory: Any = compiled.memory_analysis()
    for batch in at.batches:
        jitted.trace(state, at.case.params, batch)  # traces again only for other types
        state, _ = compiled(state, at.case.params, batch)
    return {
        "flops": measure.cost(compiled).flops,
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "build_seconds": best,
        "programs": len(traces),
    }


def _counted(case: programs.Case, traces: list[int]) -> tuple[Any, Any]:
    """Returns the jitted step, which records each trace, and its state."""
    step, state = trainers.plain(case)

    def counted(*args: Any) -> Any:
        traces.append(1)
        return step(*args)

    return jax.jit(counted, donate_argnums=0), state


def compare(
    sweeps: Mapping[str, Sequence[int]], base: gpt2.Shape, builds: int
) -> list[dict[str, Any]]:
    """Measures every point of every sweep, with and without adapters."""

    @functools.cache
    def bare(shape: gpt2.Shape) -> dict[str, float]:
        return measured(_single(programs.adapted(shape, "none")), builds)

    rows = []
    for sweep, values in sweeps.items():
        for value in values:
            at, shape = point(sweep, value, base)
            # without adapters, rank makes no difference
            without = bare(dataclasses.replace(shape, rank=base.rank))
            row: dict[str, Any] = {"sweep": sweep, "value": value}
            row |= {"adapted": measured(at, builds), "without": without}
            rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns everything as markdown."""
    units = {"flops": 1e9, "temp_bytes": 1e6, "argument_bytes": 1e6, "build_seconds": 1}
    names = ("GFLOPs", "temp MB", "argument MB", "trace + compile CPU s")
    header = ["what is varied"]
    for name in names:
        header += [name, "/ without adapters"]
    lines = []
    for row in rows:
        line = [f"{row['sweep']} {row['value']}"]
        for key, unit in units.items():
            own = row["adapted"][key]
            line += [f"{own / unit:.2f}", f"{own / row['without'][key]:.3f}"]
        lines.append([*line, f"{row['adapted']['programs']:.0f}"])
    return tables.markdown([*header, "programs"], lines)


def draw(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Draws the ratios, with a panel per sweep."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sweeps = list(dict.fromkeys(row["sweep"] for row in rows))
    shape = (1, len(sweeps)) if len(sweeps) < 3 else (2, -(-len(sweeps) // 2))
    size = (4.1 * shape[1], 2.9 * shape[0])
    figure, axes = plt.subplots(*shape, figsize=size, sharey=True, squeeze=False)
    for axis, sweep in zip(axes.flat, sweeps, strict=False):
        own = [row for row in rows if row["sweep"] == sweep]
        x = [row["value"] for row in own]
        for (key, label), colour, marker in zip(
            MEASURES.items(), tables.COLOURS, "osD^", strict=False
        ):
            ratio = [row["adapted"][key] / row["without"][key] for row in own]
            axis.plot(x, ratio, color=colour, marker=marker, markersize=4, label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(x, [str(value) for value in x])
        axis.set_yscale("log", base=2)
        axis.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.set(xlabel=LABELS[sweep])
    for axis in axes.flat[len(sweeps) :]:
        axis.remove()
    for axis in axes[:, 0]:
        axis.set(ylabel="step with adapters\n/ without (ratio)")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=4, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str]) -> None:
    """Measures every point, prints the table and draws the figure."""
    del argv
    flag = flags.FLAGS
    adapt_cost.pin(flag.threads)
    jax.config.update("jax_enable_compilation_cache", False)
    facts = tables.about(("jax", "flax", "optax"))
    rows = compare(SWEEPS, BASE, flag.builds)
    print(f"{tables.caption(facts)}\n\n{table(rows)}")
    if flag.out:
        result = {"about": facts, "base": dataclasses.asdict(BASE), "rows": rows}
        pathlib.Path(flag.out).write_text(json.dumps(result, indent=1) + "\n")
    if _FIGURE.value:
        draw(rows, pathlib.Path(_FIGURE.value))


if __name__ == "__main__":
    app.run(main)
