"""What a population costs: K members in one program against K consecutive runs.

    python -m experiments.benchmarks.population_cost --out=population_cost.json

Train steps (adapted GPT-2-shaped model, Adam) of members that differ in seed, learning
rate and alpha. A single run has its scale in the program's text, as in hand-written
LoRA, so K members take K programs; the population takes one. Prints XLA's count of
FLOPs, the wall and CPU time of a step per adapter, and the number and time of
compilations. All members must agree with their single runs (`measure.agree_alike`)
before anything is reported.

The arithmetic costs the same on XLA:CPU: its batched thin products are as fast as the
same number of separate ones. What differs is memory. The population's temporaries are K
times those of one run and do not fit the caches; from 32 MB (glibc's largest threshold)
they are mapped again and page-faulted at every step, while those of a small run come
from the heap. A malloc setting keeps the memory (see `frameworks`), and `at_once`
bounds the temporaries: the table has every batch with all members at once and one at a
time.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax
from absl import app, flags

from experiments import paired
from experiments.benchmarks import adapt_cost
from experiments.benchmarks.cases import gpt2_shaped as gpt2
from experiments.benchmarks.cases import measure, programs
from experiments.machine import tables, timing
from lorax import population, training

# Beside those of adapt_cost: --layers, --width, --rounds, --threads, --out.
_SEQUENCES = flags.DEFINE_multi_integer(
    "sequences", [1, 8], "Sequences in a batch, of 128 tokens each; repeat for rows."
)
_MEMBERS = flags.DEFINE_integer("members", 8, "Members of the population.")


BETA1 = 0.9  # of optax.adam


class Program(NamedTuple):
    """A step with the state that it starts from."""

    step: Callable[..., Any]
    state: Any

    def lower(self, *inputs: Any) -> jax.stages.Lowered:
        """Traces the step, with its state donated."""
        return jax.jit(self.step, donate_argnums=0).lower(self.state, *inputs)


def make(
    shape: gpt2.Shape, size: int, at_once: int
) -> tuple[Program, list[Program], Any, Any]:
    """Returns the population, its members' single runs, the base and a batch."""
    case = programs.adapted(shape)
    model = gpt2.Gpt2(shape)

    @training.simple_loss
    def loss_fn(params: Any, batch: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, batch[:, :-1])
        return gpt2.cross_entropy(logits, batch)

    tx = optax.inject_hyperparams(optax.adam)(learning_rate=1.0)
    keys = jax.random.split(jax.random.key(0), size)
    rates = [1e-3 * (k + 1) for k in range(size)]
    members = [_member(case.trained, k) for k in range(size)]
    together = population.create_population(
        keys, members, tx, case.params, hyperparams={"learning_rate": rates}
    )
    alone = []
    for key, adapters, rate in zip(keys, members, rates, strict=True):
        own = optax.adam(rate)
        step = training.make_train_step(loss_fn, own, on_merge="error")
        alone.append(Program(step, training.create_state(key, adapters, own)))
    both = population.make_population_step(
        loss_fn, tx, on_merge="error", at_once=at_once
    )
    return Program(both, together), alone, case.params, case.tokens


def _member(adapters: Any, k: int) -> Any:
    """Returns adapters with another alpha and other factors."""

    def noise(leaf: jax.Array) -> jax.Array:
        return 1e-3 * jax.random.normal(jax.random.key(k), leaf.shape)

    changed = jax.tree.map(lambda leaf: leaf + noise(leaf), adapters)
    return {
        path: dataclasses.replace(adapter, scale=adapter.scale * (k + 4) / 8)
        for path, adapter in changed.items()
    }


def measured(shape: gpt2.Shape, size: int, rounds: int, at_once: int) -> dict[str, Any]:
    """Measures everything for one shape; `at_once` must divide `size`."""
    together, alone, *inputs = make(shape, size, at_once)
    seconds, compiled = _timed(together, inputs)
    each, singles = zip(*(_timed(program, inputs) for program in alone), strict=True)
    count, own = measure.cost(compiled), [measure.cost(single) for single in singles]

    state, states = agreeing_steps(shape, together, alone, compiled, singles, inputs)

    def run_population() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(compiled(state, *inputs))

    def run_in_turn() -> None:
        for k, single in enumerate(singles):
            states[k], _ = jax.block_until_ready(single(states[k], *inputs))

    steps = {"population": run_population, "in turn": run_in_turn}
    return {
        "sequences": shape.batch,
        "at_once": at_once,
        "flops_per_adapter": count.flops / at_once,  # a loop's body is counted once
        "flops_alone": statistics.fmean(cost.flops for cost in own),
        "temp_bytes": count.temp,
        "temp_bytes_alone": max(cost.temp for cost in own),
        "compile_s": seconds,
        "compile_s_alone": each,
        "seconds": timing.interleave(steps, rounds),
        "cpu_seconds": timing.interleave(steps, rounds, time.process_time),
    }


def agreeing_steps(
    shape: gpt2.Shape,
    together: Program,
    alone: Sequence[Program],
    compiled: Any,
    singles: Sequence[Any],
    inputs: Sequence[Any],
) -> tuple[Any, list[Any]]:
    """Makes one step of each, asserts that they agree, and returns their states."""
    case, states = programs.adapted(shape), []
    exact = [
        programs.in_float64(case._replace(trained=own.state.adapters)) for own in alone
    ]
    state, metrics = compiled(together.state, *inputs)
    shared = _gradients(state.state.opt_state)
    for k, single in enumerate(singles):
        after, values = single(alone[k].state, *inputs)
        found = {
            "a member": (metrics["loss"][k], [own[k] for own in shared]),
            "its own run": (values["loss"], _gradients(after.opt_state)),
        }
        loss, slopes = exact[k]
        measure.agree_alike(found, (loss, jax.tree.leaves(slopes)))
        states.append(after)
    return state, states


def _gradients(opt_state: Any) -> list[jax.Array]:
    """Returns the gradients of the first step, from Adam's first moments.

    Its first updates are only their signs, which rounding flips where a gradient is
    zero up to rounding.
    """
    return [mu / (1 - BETA1) for mu in jax.tree.leaves(optax.tree.get(opt_state, "mu"))]


def _timed(program: Program, inputs: Sequence[Any]) -> tuple[float, Any]:
    """Returns CPU seconds to build, and what was built."""
    jax.clear_caches()
    began = time.process_time()
    made = program.lower(*inputs).compile()
    return time.process_time() - began, made


def table(rows: Sequence[dict[str, Any]], size: int) -> str:
    """Returns everything as markdown, with a row per batch size and group."""
    header = ["sequences in a batch, members at once"]
    header += ["GFLOPs per adapter-step", "/ one run"]
    header += ["ms per adapter-step", "best / in turn", "median of paired ratios"]
    header += ["CPU time, median of paired ratios"]
    header += ["temp MB", "/ one run", "programs", "compile CPU s", "/ K programs"]
    lines = []
    for row in rows:
        both = row["seconds"]
        own, turn = both["population"], both["in turn"]
        lines.append(
            [
                f"{row['sequences']}, {row['at_once']} of {size}",
                f"{row['flops_per_adapter'] / 1e9:.2f}",
                f"{row['flops_per_adapter'] / row['flops_alone']:.4f}",
                f"{1e3 * min(own) / size:.1f}",
                f"{min(own) / min(turn):.3f}",
                f"{paired.ratio(own, turn):.3f}",
                f"{paired.ratio(*row['cpu_seconds'].values()):.3f}",
                f"{row['temp_bytes'] / 1e6:.0f}",
                f"{row['temp_bytes'] / row['temp_bytes_alone']:.2f}",
                f"1 for {len(row['compile_s_alone'])}",
                f"{row['compile_s']:.1f}",
                f"{row['compile_s'] / sum(row['compile_s_alone']):.2f}",
            ]
        )
    return tables.markdown(header, lines)


def main(argv: Sequence[str]) -> None:
    """Measures every batch size and prints the table."""
    del argv
    flag = flags.FLAGS
    adapt_cost.pin(flag.threads)
    jax.config.update("jax_enable_compilation_cache", False)
    size, rows = _MEMBERS.value, []
    for batch, at_once in itertools.product(_SEQUENCES.value, (size, 1)):
        shape = gpt2.Shape(layers=flag.layers, width=flag.width, batch=batch)
        rows.append(measured(shape, size, flag.rounds, at_once))
    facts = tables.about(("jax", "optax"))
    print(f"{tables.caption(facts)}\n\n{table(rows, size)}")
    if flag.out:
        pathlib.Path(flag.out).write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    app.run(main)
