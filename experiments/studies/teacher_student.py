"""Which optimiser learns a low-rank change fastest, and does AdaLoRA find the ranks?

    python -m experiments.studies.teacher_student --study_dir=runs/teacher_student

A student with frozen kernels W_k sees batches (x, x W*_k + noise) of teachers
W*_k = W_k + D_k, with D_k of low rank. Adapters are trained with a learning rate that
decays linearly to zero; the score is the noiseless distance, sum |W_k + update -
W*_k|^2 over sum |D_k|^2.

Problems: "one kernel", 64 x 48, a teacher of rank 4, methods of the same rank; "unequal
ranks", six kernels 32 x 32 whose teachers have the ranks 8, 4, 2, 1, 0 and 0, LoRA of
rank 3 each against AdaLoRA with the same total at its end.

The floor is the least distance that can be reached from the start: an adapter of rank r
can move the kernel that `init` returned by any matrix of rank r, and what lies beyond
the r largest singular values of (teacher - that kernel) remains.

Every method has the same number of learning rates, a factor 2 apart, chosen on seeds
that are not reported; if the best is at an end, the grid moves. Other seeds are
reported: mean and standard error, and the paired difference to LoRA with its 95 %
interval. Each method is one vmapped program.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

import lorax
from experiments.machine import disk
from experiments.studies.method import comparison
from lorax import _lapack, optim
from lorax import adapters as adapter_classes

_STEPS = flags.DEFINE_integer("steps", 400, "Steps of training.", lower_bound=20)
_RATES = flags.DEFINE_integer("rates", 9, "Number of learning rates in a grid.")

BATCH = 32
AXES = ("step", "relative squared distance")


class Problem(NamedTuple):
    """The kernels' shape, the teachers' ranks, and the noise on the targets."""

    shape: tuple[int, int]
    ranks: tuple[int, ...]
    noise: float


class Method(NamedTuple):
    """How adapters start and train.

    Attributes:
      target: for the kernels.
      make_tx: `(rate, steps) -> optimiser`; the rate may be a schedule.
      centre: the middle of the grid of learning rates.
    """

    target: lorax.Target
    make_tx: Callable[[Any, int], Any]
    centre: float


ONE = Problem((64, 48), (4,), 1.0)
NOISY = Problem((64, 48), (4,), 4.0)
UNEQUAL = Problem((32, 32), (8, 4, 2, 1, 0, 0), 0.5)


def _lora(rank: int, **fields: Any) -> lorax.Target:
    return lorax.Target(".*", rank=rank, alpha=rank, **fields)


def _adalora(rate: Any, steps: int) -> Any:
    return optim.adalora(
        optax.adam(rate),
        target_budget=18,
        total_steps=steps,
        initial_warmup=steps // 8,
        final_steps=steps // 4,
        interval=max(1, steps // 40),
    )


def _factor(rate: Any, _: int) -> Any:
    return optim.lora_pro(rate, mode="factor")


GA = _lora(4, init="lora_ga", options={"scale": "gd"})
METHODS = {
    "LoRA": Method(_lora(4), lambda rate, _: optax.adam(rate), 4e-3),
    "LoRA+": Method(_lora(4), lambda rate, _: optim.lora_plus(rate, 16.0), 1e-3),
    "LoRA-Pro, factor": Method(_lora(4), _factor, 4e-3),
    "LoRA-GA + LoRA-Pro, factor": Method(GA, _factor, 4e-3),
    "Muon on b": Method(_lora(4), lambda rate, _: optim.muon(rate), 4e-3),
}
ALLOCATION = {
    "LoRA": Method(_lora(3), lambda rate, _: optax.adam(rate), 4e-3),
    "AdaLoRA from rank 5": Method(_lora(5, adapter="adalora"), _adalora, 8e-3),
    "AdaLoRA from rank 8": Method(_lora(8, adapter="adalora"), _adalora, 8e-3),
}


def teacher(problem: Problem, key: jax.Array) -> tuple[dict, dict]:
    """Returns frozen kernels, and the changes to learn, with singular values 1."""
    n, m = problem.shape
    base, change = {}, {}
    for k, rank in enumerate(problem.ranks):
        keys = jax.random.split(jax.random.fold_in(key, k), 3)
        base[f"k{k}"] = jax.random.normal(keys[0], (n, m)) / math.sqrt(n)
        left = _lapack.qr(jax.random.normal(keys[1], (n, max(rank, 1))))[0]
        right = _lapack.qr(jax.random.normal(keys[2], (m, max(rank, 1))))[0]
        change[f"k{k}"] = (left @ right.T) * (rank > 0)
    return base, change


def loss_fn(params: Any, batch: Any) -> jax.Array:
    """Returns half the squared error of all kernels, averaged over the batch."""
    x, targets = batch

    def error(name: str) -> jax.Array:
        return jnp.sum((x @ params[name] - targets[name]) ** 2)

    total: Any = sum(map(error, params))
    return 0.5 * total / len(x)


def examples(
    problem: Problem, key: jax.Array, goal: Any, step: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the batch of a step: inputs, and the goal's noisy outputs by kernel."""
    own = jax.random.split(jax.random.fold_in(key, step), 1 + len(goal))
    x = jax.random.normal(own[0], (BATCH, problem.shape[0]))
    targets = {
        name: x @ w + problem.noise * jax.random.normal(k, (BATCH, w.shape[1]))
        for k, (name, w) in zip(own[1:], goal.items(), strict=True)
    }
    return x, targets


def least_distance(params: Any, goal: Any, rank: int) -> jax.Array:
    """Returns the least squared distance to the goal at a rank (Eckart-Young)."""

    def values(w: jax.Array, g: jax.Array) -> jax.Array:
        return _lapack.svd(g - w)[1]

    left = jax.tree.leaves(jax.tree.map(values, params, goal))
    return jnp.sum(jnp.stack(left)[:, rank:] ** 2)


def make_run(problem: Problem, method: Method, steps: int) -> Callable[..., Any]:
    """Returns `run(seed, rate) -> (distance at every step, effective ranks, floor)`."""

    def run(seed: jax.Array, rate: jax.Array) -> tuple[jax.Array, Any, jax.Array]:
        key = jax.random.key(seed)
        base, change = teacher(problem, jax.random.fold_in(key, 0))
        goal = jax.tree.map(jnp.add, base, change)

        batch = functools.partial(examples, problem, key, goal)
        targets, stats = [method.target], None
        if method.target.init == "lora_ga":
            first = [batch(10_000 + i) for i in range(4)]
            stats = lorax.calibrate(key, loss_fn, base, targets, first)
        adapters, params = lorax.init(key, base, targets, stats=stats)
        tx = optax.with_extra_args_support(
            method.make_tx(lambda count: rate * (1 - count / steps), steps)
        )
        gradient = jax.grad(lorax.adapt(loss_fn))

        def step(carry: Any, index: jax.Array) -> Any:
            adapters, state = carry
            grads = gradient(adapters, params, batch(index))
            updates, state = tx.update(grads, state, adapters, base=params)
            adapters = optax.apply_updates(adapters, updates)
            merged = lorax.merge(adapters, params)
            away = jax.tree.map(lambda w, g: jnp.sum((w - g) ** 2), merged, goal)
            return (adapters, state), sum(away.values())

        carry = adapters, tx.init(adapters)
        (adapters, state), away = jax.lax.scan(step, carry, jnp.arange(1, steps + 1))
        size = sum(jnp.sum(d**2) for d in change.values())
        ranks: Any = {}
        if adapter_classes.get(method.target.adapter).counts_ranks:
            ranks = optim.adalora_effective_ranks(state)
        floor = least_distance(params, goal, method.target.rank)
        return away / size, ranks, floor / size

    return jax.jit(jax.vmap(jax.vmap(run, (None, 0)), (0, None)))


def sweep(
    problem: Problem, method: Method, steps: int, seeds: int, count: int
) -> dict[str, Any]:
    """Chooses the learning rate on the first seeds, and reports the next ones."""
    run, shift = make_run(problem, method, steps), 0
    choose, report = np.arange(seeds), seeds + np.arange(seeds)
    while True:
        powers = np.arange(count) - count // 2 + shift
        rates = method.centre * 2.0**powers
        final = np.asarray(run(choose, jnp.asarray(rates))[0])[:, :, -1]
        mean = np.where(np.isfinite(final), final, np.inf).mean(0)
        best = int(mean.argmin())
        if 0 < best < count - 1 or abs(shift) > 3 * count:
            break
        shift += count // 2 if best else -(count // 2)
    curves, ranks, floor = run(report, jnp.asarray(rates[best : best + 1]))
    return {
        "rate": float(rates[best]),
        "grid": {f"{r:.3g}": float(v) for r, v in zip(rates, mean, strict=True)},
        "curves": np.asarray(curves)[:, 0].tolist(),
        "floor": float(np.mean(floor)),
        "ranks": {path: np.asarray(r)[:, 0].tolist() for path, r in ranks.items()},
    }


def main(argv: Sequence[str]) -> None:
    """Runs the three problems, prints tables, writes results and figure."""
    del argv
    steps, seeds, count = _STEPS.value, comparison.SEEDS.value, _RATES.value
    folder = comparison.folder("teacher_student")
    results: dict[str, dict[str, Any]] = {}
    for title, problem, methods in (
        ("one kernel, noise 1", ONE, METHODS),
        ("one kernel, noise 4", NOISY, METHODS),
        ("unequal ranks", UNEQUAL, ALLOCATION),
    ):
        results[title] = {
            name: sweep(problem, method, steps, seeds, count)
            for name, method in methods.items()
        }
        print(f"\n{title}\n\n{comparison.table(results[title])}\n", flush=True)
        floors = {name: f"{own['floor']:.4f}" for name, own in results[title].items()}
        print(f"floors: {floors}", flush=True)
    print(f"\nfinal ranks, mean over seeds; the teachers': {UNEQUAL.ranks}")
    for name, own in results["unequal ranks"].items():
        mean = [f"{np.mean(r):.1f}" for _, r in sorted(own["ranks"].items())]
        print(f"{name}: {', '.join(mean) or '3 each'}")
    disk.replace(folder / "results.json", json.dumps(results))
    comparison.draw(results, folder / "curves.png", AXES)


if __name__ == "__main__":
    app.run(main)
