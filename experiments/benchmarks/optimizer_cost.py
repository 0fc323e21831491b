"""What an update of each optimiser costs, compared with AdamW's.

    python -m experiments.benchmarks.optimizer_cost --table=optimizer_cost.json

The adapters are those of GPT-2 small: 12 layers of width 768, all six linears, rank 16,
a dict of Lora by path (of AdaLora for AdaLoRA). Prints a markdown table: XLA's count of
FLOPs, bytes of state, and the time of an update, all interleaved in one run, as ratios
to AdamW on the same tree; and an update's share of a whole train step (forward and
backward of 8 x 128 tokens, then AdamW's update).

    python -m experiments.benchmarks.optimizer_cost --small_pairs=73

measures programs instead: lines of compiled HLO, and the times to build them and to
make an update, for that many small pairs of the same shape, and of different shapes.
"""

from __future__ import annotations

import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import app, flags

import lorax
from experiments import paired
from experiments.benchmarks.cases import gpt2_shaped as gpt2
from experiments.benchmarks.cases import measure, programs
from experiments.machine import tables, timing
from lorax import optim

_ROUNDS = flags.DEFINE_integer("updates", 11, "Interleaved rounds of timed updates.")
_SMALL = flags.DEFINE_integer("small_pairs", 0, "Number; 0: GPT-2's adapters.")
_OUT = flags.DEFINE_string("table", None, "Where to write every figure as JSON.")

SHAPE = gpt2.Shape(layers=12, width=768, heads=12, rank=16, batch=8)
RATE = 1e-3


def _spectral(target: Any) -> Any:
    return optax.chain(
        optax.scale_by_adam(),
        optim.add_decayed_spectral_norm(0.1, target=target),
        optax.scale_by_learning_rate(RATE),
    )


def _adalora(budget: int) -> Any:
    return optim.adalora(
        optax.adamw(RATE),
        target_budget=budget // 2,
        total_steps=1000,
        initial_warmup=100,
        final_steps=100,
        interval=10,
    )


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "adamw": lambda: optax.adamw(RATE),
    "lora_plus": lambda: optim.lora_plus(RATE),
    "lora_pro factor": lambda: optim.lora_pro(RATE, mode="factor"),
    "lora_pro rowcol": lambda: optim.lora_pro(RATE, mode="rowcol"),
    "riemannian": lambda: optim.riemannian(RATE),
    "lora_fa": lambda: optim.lora_fa(RATE),
    "lora_rite": lambda: optim.lora_rite(RATE),
    "riemannion": lambda: optim.riemannion(RATE),
    "reflora": lambda: optim.reflora(RATE),
    "adam + spectral delta": lambda: _spectral("delta"),
    "adam + spectral factors": lambda: _spectral("factors"),
    "muon b": lambda: optim.muon(RATE),
    "muon both": lambda: optim.muon(RATE, "both"),
    "muon whitened": lambda: optim.muon(RATE, "whitened"),
}


def adapters(shape: gpt2.Shape, method: str = "lora") -> lorax.Adapters:
    """Returns the tree of adapters, with every factor away from zero."""
    width, hidden = shape.width, shape.hidden
    sizes = {name: (width, width) for name in "qkvo"}
    sizes |= {"up": (width, hidden), "down": (hidden, width)}
    params = {
        f"h_{i}": {name: {"kernel": jnp.zeros(size)} for name, size in sizes.items()}
        for i in range(shape.layers)
    }
    target: Any = lorax.Target(".*", rank=shape.rank, adapter=method)
    made, _ = lorax.init(jax.random.key(0), params, target)
    return jax.tree.map(
        lambda x: 0.02 * jax.random.normal(jax.random.key(x.size), x.shape), made
    )


def compiled(tx: Any, tree: lorax.Adapters) -> tuple[Any, Any]:
    """Returns the compiled update, and its arguments."""
    state = tx.init(tree)
    grads = jax.tree.map(lambda x: 0.1 * x, tree)
    update = jax.jit(lambda g, s, a: tx.update(g, s, a))
    return update.lower(grads, state, tree).compile(), (grads, state, tree)


def nbytes(tree: Any) -> int:
    """Returns the bytes of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def compare(shape: gpt2.Shape, rounds: int) -> dict[str, dict[str, Any]]:
    """Measures every optimiser's update on the same tree, interleaved."""
    plain, svd = adapters(shape), adapters(shape, "adalora")
    budget = shape.layers * len(gpt2.LINEARS) * shape.rank
    made = {name: compiled(make(), plain) for name, make in OPTIMIZERS.items()}
    made["adamw on AdaLora"] = compiled(OPTIMIZERS["adamw"](), svd)
    made["adalora"] = compiled(_adalora(budget), svd)
    seconds = timing.interleave(
        {name: functools.partial(step, *args) for name, (step, args) in made.items()},
        rounds,
    )
    rows = {}
    for name, (step, args) in made.items():
        beside = "adamw on AdaLora" if name == "adalora" else "adamw"
        rows[name] = {
            "gflops": measure.cost(step).flops / 1e9,
            "state": nbytes(args[1]),
            "state_ratio": nbytes(args[1]) / nbytes(made[beside][1][1]),
            "ms": 1e3 * min(seconds[name]),
            "best": min(seconds[name]) / min(seconds[beside]),
            "paired": paired.ratio(seconds[name], seconds[beside]),
        }
    return rows


def train_step_ms(shape: gpt2.Shape, rounds: int) -> float:
    """Returns milliseconds of the adapted model's forward and backward pass."""
    case = programs.adapted(shape)
    step = measure.runner(measure.compile_step(case), case)
    return 1e3 * statistics.median(timing.interleave({"step": step}, rounds)["step"])


def small_pairs(count: int, equal: bool, rank: int = 8) -> lorax.Adapters:
    """Returns pairs for kernels `[48, 40]`, or `[48, 40]`, `[49, 40]` and so on."""
    params = {f"w_{i}": jnp.zeros((48 + (0 if equal else i), 40)) for i in range(count)}
    made, _ = lorax.init(jax.random.key(0), params, lorax.Target(".*", rank=rank))
    return jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(x.size), x.shape), made
    )


def compare_programs(
    count: int, rounds: int, names: Sequence[str] = tuple(OPTIMIZERS)
) -> dict[str, dict[str, Any]]:
    """Returns lines, build seconds and run milliseconds, for equal and other shapes."""
    rows: dict[str, dict[str, Any]] = {name: {} for name in names}
    runs: dict[str, Any] = {}
    for kind in ("equal", "unequal"):
        tree = small_pairs(count, kind == "equal")
        for name in names:
            start = time.perf_counter()
            step, args = compiled(OPTIMIZERS[name](), tree)
            rows[name][f"{kind}_build_s"] = time.perf_counter() - start
            rows[name][f"{kind}_lines"] = len(step.as_text().splitlines())
            runs[f"{kind} {name}"] = functools.partial(_run, step, args)
    for key, seconds in timing.interleave(runs, rounds).items():
        kind, name = key.split(" ", 1)
        rows[name][f"{kind}_ms"] = 1e3 * min(seconds)
    return rows


def _run(step: Any, args: Any) -> Any:
    return jax.block_until_ready(step(*args))


def programs_table(rows: dict[str, dict[str, Any]]) -> str:
    """Returns the figures of `compare_programs` as markdown."""
    header, kinds = ["update"], ("equal", "unequal")
    for kind in kinds:
        header += [f"HLO lines, {kind} shapes", "/ AdamW", "build s", "best ms"]

    def cells(row: dict[str, Any], kind: str) -> list[str]:
        lines = row[f"{kind}_lines"]
        ratio = lines / rows["adamw"][f"{kind}_lines"]
        return [
            f"{lines}",
            f"{ratio:.2f}",
            f"{row[f'{kind}_build_s']:.1f}",
            f"{row[f'{kind}_ms']:.2f}",
        ]

    return tables.markdown(
        header,
        [
            [name, *cells(row, "equal"), *cells(row, "unequal")]
            for name, row in rows.items()
        ],
    )


def table(rows: dict[str, dict[str, Any]], step_ms: float) -> str:
    """Returns the figures as markdown."""
    header = ["update", "GFLOPs", "state MB", "state / AdamW", "best ms"]
    header += ["best / AdamW", "median of paired ratios", "share of a train step"]
    whole = step_ms + rows["adamw"]["ms"]
    return tables.markdown(
        header,
        [
            [
                name,
                f"{row['gflops']:.3f}",
                f"{row['state'] / 1e6:.1f}",
                f"{row['state_ratio']:.3f}",
                f"{row['ms']:.1f}",
                f"{row['best']:.2f}",
                f"{row['paired']:.2f}",
                f"{row['ms'] / whole:.1%}",
            ]
            for name, row in rows.items()
        ],
    )


def main(argv: Sequence[str]) -> None:
    """Runs everything and prints the table."""
    del argv
    if _SMALL.value:
        rows = compare_programs(_SMALL.value, _ROUNDS.value)
        facts = tables.about(("jax", "optax"))
        print(f"{tables.caption(facts)}\n\n{programs_table(rows)}")
        return
    step_ms = train_step_ms(SHAPE, 3)
    rows = compare(SHAPE, _ROUNDS.value)
    facts = tables.about(("jax", "optax"))
    print(f"{tables.caption(facts)}\n\n{table(rows, step_ms)}")
    print(f"\nforward and backward: {step_ms:.0f} ms")
    if _OUT.value:
        pathlib.Path(_OUT.value).write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    app.run(main)
