"""Over batch sizes, which law does the best rate of a whole run follow?

    python -m experiments.studies.claims.batch_rates

all-MiniLM-L6-v2 (22.7 million parameters) learns banking77 with LoRA of rank 8 on all
36 linear kernels, as in the benchmark: 60 steps of 4, 16 and 64 sentences. The score of
a run is its loss on 512 sentences of the training set. Each batch size and seed gets
rates a quarter of a decade apart, until the best lies inside; a parabola through the
best three, in the logarithm of the rate, is the best rate. The laws of `lorax.scaling`
get the simple noise scale of LoRA's factors, measured after 30 steps of 16 sentences,
and no constant is fitted: each predicts by how much the best rate changes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

from experiments import paired
from experiments.machine import tables
from experiments.studies.claims import laws, steps
from experiments.studies.method import comparison, scorecard, trial
from experiments.studies.pretrained import arms, bases
from experiments.studies.questions import batch_sizes

_MINUTES = flags.DEFINE_float("batch_minutes", None, "Time limit for new runs.")

SIZES = (4, 16, 64)
STEPS, SEEDS = 60, (1, 2, 3)
GRID = tuple(10 ** (k / 4) for k in range(-13, -9))
SCORED = 32  # batches of 16 sentences


def setting_of(size: int) -> tuple[bases.Task, bases.Setting]:
    """banking77 in batches of so many sentences."""
    task = bases.TASKS["banking77"]
    task = task._replace(fields={**task.fields, "data.batch_size": size})
    return task, bases.make_setting(task)


def maker(size: int) -> Callable[[int, float], float]:
    """Returns `(seed, rate) -> loss` after a run, compiled once."""
    task, setting = setting_of(size)
    fields = {"run.steps": STEPS, "optimizer.warmup_steps": STEPS // 10}
    config = bases.configured(task, arms.Arm(fields, (), ""))
    run = trial.make_run(config, setting.loss_fn, setting.base, setting.train)
    scored = setting_of(steps.USUAL)[1].train(0)
    data = [scored[steps.BEYOND + i] for i in range(SCORED)]
    loss = jax.jit(setting.loss_fn)

    def evaluate(params: Any) -> float:
        return float(np.mean([loss(params, own)[0] for own in data]))

    return lambda seed, rate: run(seed, rate, evaluate, STEPS).curve[-1]


def optimum(runs: comparison.Runs, size: int, seed: int, make: Any = None) -> float:
    """Returns the best rate of a batch size and seed; makes its missing runs.

    Raises:
      NotRun: a run is missing and may not be made.
    """
    grid: dict[float, float] = {}

    def score(rate: float) -> float:
        made = make and (lambda: [make(seed, rate)])
        grid[rate] = runs.get((f"batch {size}", seed, rate), made)[-1]
        return grid[rate]

    comparison.best_of_grid(score, GRID)
    return batch_sizes.optimum(grid)


def study(runs: comparison.Runs) -> dict[str, Any]:
    """Makes missing runs; returns the noise scale, and the best rates by size."""
    found: dict[str, Any] = {"rates": {}}
    try:
        scale = runs.get(
            ("noise scale",),
            lambda: [steps.reach(setting_of(steps.USUAL)[1], STEPS // 2).noise_scale],
        )
        found["noise_scale"] = scale[-1]
        for size in SIZES:
            every = [_known(runs, size, seed) for seed in SEEDS]
            if None in every:
                make = maker(size)
                every = [optimum(runs, size, seed, make) for seed in SEEDS]
                jax.clear_caches()
            found["rates"][str(size)] = every
    except comparison.NotRun as error:
        print(f"CUT SHORT, not run: {error}")
    return found


def _known(runs: comparison.Runs, size: int, seed: int) -> float | None:
    try:
        return optimum(runs, size, seed)
    except comparison.NotRun:
        return None


def page(found: Mapping[str, Any]) -> str:
    """Returns the study's page."""
    rows, first = [], np.log2(found["rates"].get(str(SIZES[0]), np.nan))
    for size, own in ((int(size), np.log2(x)) for size, x in found["rates"].items()):
        mean, half = paired.interval(own)
        told = ["-"] * (1 + len(laws.LAWS))
        if size != SIZES[0]:
            risen, spread = paired.interval(own - first)
            told = [f"{risen:+.2f} +- {spread:.2f}"]
            for law in laws.LAWS:
                octaves = laws.octaves(law, SIZES[0], size, found["noise_scale"])
                told.append(f"{octaves:+.2f}")
        rows.append([str(size), f"{2**mean:.2e} (x/ {2**half:.2f})", *told])
    head = ["batch", "best rate (95 %)", f"octaves from {SIZES[0]}", *laws.LAWS]
    parts = [comparison.heading(__doc__), tables.markdown(head, rows), ""]
    if "noise_scale" in found:
        parts.append(f"The noise scale is {found['noise_scale']:.0f} sentences.\n")
    return "\n".join([*parts, f"{found['cpu_seconds']} CPU-seconds.\n"])


def claims(found: Mapping[str, Any]) -> list[scorecard.Claim]:
    """Returns what the laws claim of the best rates."""
    rates = {int(size): np.log2(own) for size, own in found["rates"].items()}
    made = []
    for one, other in (SIZES[:2], SIZES[1:]):
        if not {one, other} <= set(rates):
            continue
        for law in laws.LAWS:
            predicted = laws.octaves(law, one, other, found["noise_scale"])
            told = f"from batch {one} to {other}"
            where = f"LoRA on MiniLM, {STEPS} steps"
            rise = rates[other] - rates[one]
            made.append(laws.claim(law, predicted, rise, told, where))
    return made


def digests() -> dict[str, str]:
    """Returns a digest of what a run depends on, by the first part of its key."""
    shared = {**bases.SHARED, **bases.TASKS["banking77"].fields}
    digest = comparison.digest(shared, STEPS, SCORED, jax.__version__)
    return dict.fromkeys(["noise scale", *(f"batch {size}" for size in SIZES)], digest)


def main(argv: Sequence[str]) -> None:
    """Resumes the study, and writes results and table."""
    del argv
    folder = comparison.folder("batch_rates")
    runs = comparison.Runs(folder / "runs.jsonl", digests(), _MINUTES.value)
    found = study(runs)
    seconds = sum(line["cpu_seconds"] for line in runs.lines.values())
    comparison.publish(folder, {**found, "cpu_seconds": round(seconds)}, page)


if __name__ == "__main__":
    app.run(main)
