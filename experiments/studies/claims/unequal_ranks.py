"""AdaLoRA: does it find unequal ranks in real-sized kernels, and with which penalty?

    python -m experiments.studies.claims.unequal_ranks

Six kernels 384 x 384, as wide as those of all-MiniLM-L6-v2; their teachers differ by
changes of the ranks 12, 6, 3, 2, 1 and 0, with all singular values 1 (the problem of
`teacher_student`; the frozen kernels cancel in the error). LoRA has rank 4 everywhere;
AdaLoRA starts at 12 and ends with the same total of 24 triplets. The score is the
noiseless squared distance to the teachers, relative to the start: LoRA of rank 4 cannot
go below 10 / 24.

AdaLoRA chooses triplets every ten steps and has the default penalty, unless an arm's
name says otherwise. "released" is the authors' 0.1 of the mean norm, in the loss. The
first tenth of a run prunes nothing, and the last third keeps what is left.

Rates: three, a factor 2 apart, and up to three more while the best lies at the edge, on
two seeds; eight others are reported, each paired with LoRA on the same seed.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

import lorax
from experiments import paired
from experiments.machine import tables
from experiments.studies import teacher_student
from experiments.studies.method import comparison, scorecard
from lorax import optim

_MINUTES = flags.DEFINE_float("unequal_minutes", None, "Time limit for new runs.")

PROBLEM = teacher_student.Problem((384, 384), (12, 6, 3, 2, 1, 0), 0.25)
BUDGET, RANK, START = 24, 4, 12
BATCH = 32
CHOOSE, REPORT = (100, 101), tuple(range(8))
GRID = (0.004, 0.008, 0.016)


class Arm(NamedTuple):
    """LoRA at a rank, or AdaLoRA with a form and weight of the penalty."""

    rank: int = START
    form: Any = None
    weight: float = 0.0
    interval: int = 10


FORMS = {
    "LoRA": Arm(RANK),
    "AdaLoRA": Arm(form="decoupled", weight=0.3),
    "AdaLoRA, no penalty": Arm(form="decoupled"),
    "AdaLoRA, released": Arm(form="norm", weight=0.1),
}
ARMS = {
    **FORMS,
    "LoRA, rank 12 each": Arm(),
    "AdaLoRA, every 3": Arm(form="decoupled", weight=0.3, interval=3),
    "AdaLoRA, every 30": Arm(form="decoupled", weight=0.3, interval=30),
}
LENGTHS: dict[int, dict[str, Arm]] = {90: FORMS, 500: ARMS, 1000: FORMS}
"""Steps of a run -> its arms."""


@functools.cache
def make_run(arm: Arm, steps: int) -> Any:
    """Returns the compiled `run(seed, rate) -> (distance, ranks by kernel)`."""

    def run(seed: jax.Array, rate: jax.Array) -> tuple[jax.Array, Any]:
        keys = jax.random.split(jax.random.key(seed), 3)
        base, changes = teacher_student.teacher(PROBLEM, keys[0])
        adapter = "lora" if arm.form is None else "adalora"
        target = lorax.Target(".*", rank=arm.rank, alpha=arm.rank, adapter=adapter)
        adapters, _ = lorax.init(keys[1], base, [target])
        tx = _optimizer(arm, optax.linear_schedule(rate, 0.0, steps), steps)

        def loss_fn(adapters: Any, step: Any) -> jax.Array:
            own = jax.random.split(jax.random.fold_in(keys[2], step), 2)
            x = jax.random.normal(own[0], (BATCH, PROBLEM.shape[0]))
            shape = len(changes), BATCH, PROBLEM.shape[1]
            noise = PROBLEM.noise * jax.random.normal(own[1], shape)
            off = [
                jnp.sum(
                    (_product(arm, x, adapters[k]) - x @ changes[k] - noise[i]) ** 2
                )
                for i, k in enumerate(sorted(changes))
            ]
            return 0.5 * jnp.sum(jnp.stack(off)) / BATCH

        def step(carry: Any, index: Any) -> Any:
            adapters, state = carry
            grads = jax.grad(loss_fn)(adapters, index)
            updates, state = tx.update(grads, state, adapters)
            return (optax.apply_updates(adapters, updates), state), None

        start = adapters, tx.init(adapters)
        (adapters, state), _ = jax.lax.scan(step, start, jnp.arange(steps))
        unit = jnp.eye(PROBLEM.shape[0])
        away = [
            jnp.sum((_product(arm, unit, adapters[k]) - d) ** 2)
            for k, d in changes.items()
        ]
        size = sum(PROBLEM.ranks)
        counted = {} if arm.form is None else optim.adalora_effective_ranks(state)
        return jnp.sum(jnp.stack(away)) / size, counted

    return jax.jit(run)


def _product(arm: Arm, x: jax.Array, adapter: Any) -> jax.Array:
    """Returns what an arm's adapter adds to the kernel's output."""
    if arm.form is None:
        return adapter.scale * (x @ adapter.a) @ adapter.b
    return adapter.scale * ((x @ adapter.p) * adapter.lam) @ adapter.q


def _optimizer(arm: Arm, rate: Any, steps: int) -> optax.GradientTransformation:
    if arm.form is None:
        return optax.adam(rate)
    return optim.adalora(
        optax.adam(rate),
        target_budget=BUDGET,
        total_steps=steps,
        initial_warmup=steps // 10,
        final_steps=steps // 3,
        interval=arm.interval,
        orthogonal_form=arm.form,
        orthogonal_weight=arm.weight,
    )


def study(name: str, steps: int, runs: comparison.Runs) -> dict[str, Any]:
    """Makes an arm's missing runs, and returns its results.

    Returns:
      "rate", "grid" {rate: mean distance on the choosing seeds}, "final" by reported
      seed, and "ranks" [seed][kernel] at the end, empty for LoRA.
    """
    grid: dict[str, float] = {}

    def line(seed: int, rate: float) -> dict[str, Any]:
        def made() -> dict[str, Any]:
            run = make_run(ARMS[name], steps)
            away, ranks = run(seed, rate)
            counted = [int(np.asarray(ranks[k]).item()) for k in sorted(ranks)]
            return {"curve": [float(away)], "ranks": counted}

        return runs.line((name, steps, seed, rate), made)

    def score(rate: float) -> float:
        found = float(np.mean([line(seed, rate)["curve"][-1] for seed in CHOOSE]))
        grid[f"{rate:.3g}"] = found
        return found

    rate = comparison.best_of_grid(score, GRID)
    lines = [line(seed, rate) for seed in REPORT]
    return {
        "rate": rate,
        "grid": grid,
        "final": [own["curve"][-1] for own in lines],
        "ranks": [own["ranks"] for own in lines],
    }


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the markdown table for one length of runs."""
    ranks = ", ".join(map(str, PROBLEM.ranks))
    header = ["arm", "rate", "distance", "minus LoRA (95 %)", f"ranks; {ranks} wanted"]
    rows = []
    for name, own in found.items():
        final = np.array(own["final"])
        off = final - np.array(found["LoRA"]["final"])
        mean = np.mean(own["ranks"], 0) if own["ranks"][0] else ()
        rows.append(
            [
                name,
                f"{own['rate']:.2g}",
                f"{final.mean():.4f}",
                "-" if name == "LoRA" else paired.difference(off),
                ", ".join(f"{rank:.1f}" for rank in mean) or "-",
            ]
        )
    return tables.markdown(header, rows)


def digest(arm: Arm) -> str:
    """Returns a digest of what an arm's runs depend on, besides their key."""
    return comparison.digest(arm, PROBLEM, BUDGET, BATCH, jax.__version__)


def page(found: Mapping[str, Any]) -> str:
    """Returns the tables of all lengths."""
    lengths = found["lengths"].items()
    parts = [f"## {steps} steps\n\n{table(own)}\n" for steps, own in lengths if own]
    cost = f"{found['cpu_seconds']} CPU-seconds.\n"
    return "\n".join([comparison.heading(__doc__), *parts, cost])


def claims(found: Mapping[str, Any]) -> list[scorecard.Claim]:
    """Returns the paper's claims about AdaLoRA against LoRA, and its penalty."""
    pairs = (
        ("AdaLoRA learns more if kernels need unequal ranks", "AdaLoRA", "LoRA"),
        ("The penalty helps AdaLoRA", "AdaLoRA, released", "AdaLoRA, no penalty"),
    )
    rows = []
    for claimed, arm, other in pairs:
        for steps, own in found["lengths"].items():
            if arm in own and other in own:
                number = f"relative distance, {arm} minus {other}; {steps} steps"
                values = np.subtract(own[arm]["final"], own[other]["final"])
                row = scorecard.Claim(claimed, "2303.10512", number, values, high=0.0)
                rows.append(row)
    return rows


def main(argv: Sequence[str]) -> None:
    """Resumes the study, and writes results and tables."""
    del argv
    folder = comparison.folder("unequal_ranks")
    digests = {name: digest(arm) for name, arm in ARMS.items()}
    runs = comparison.Runs(folder / "runs.jsonl", digests, _MINUTES.value)
    lengths: dict[str, dict[str, Any]] = {}
    for steps, arms in LENGTHS.items():
        own = lengths.setdefault(str(steps), {})
        for name in arms:
            try:
                own[name] = study(name, steps, runs)
            except comparison.NotRun as error:
                print(f"CUT SHORT, not run: {name}, {steps} steps: {error}")
    seconds = sum(line["cpu_seconds"] for line in runs.lines.values())
    found = {"lengths": lengths, "cpu_seconds": round(seconds)}
    comparison.publish(folder, found, page)


if __name__ == "__main__":
    app.run(main)
