"""The page `docs/results.md`, generated from the results of the studies.

Reads every `docs/results/studies/<study>/results.json` that
`python -m experiments.studies.run` wrote there.
"""

import importlib
import json
import pathlib
from typing import Any

import numpy as np

from experiments import paired
from experiments.machine import tables
from experiments.studies.method import panels

STUDIES = (
    "lora_plus_grid",
    "ranks",
    "budgets",
    "inits",
    "trajectories",
    "decay",
    "matrices",
    "dora_ranks",
    "muon",
    "batch_sizes",
    "epsilon",
    "prefix",
)
"""Modules of `experiments.studies.questions`, in the order of the page."""

DOCS = pathlib.Path(__file__).parents[3] / "docs"

HEAD = """# What the studies found

Written by `python -m experiments.report`. To run a study again:
`python -m experiments.studies.run --study=NAME --study_dir=docs/results/studies`.

A byte model of Python source (1.4 million parameters, `configs/quickstart.py`) learns
the English of the language reference; scores are held-out bits per byte, lower is
better. An arm gets four learning rates half a decade apart (and up to three more while
the best lies at the edge) on seed 0 and documents that are not reported, and fresh
seeds at its best rate. Seeds are paired: same batches, same keys. A difference is the
mean over seeds with its 95 % interval (Student's t); where that covers 0, no difference
is shown. "Equal wall time" reads an arm's curve at the moment when the other arm
finishes, from step times that were measured after the runs (best of seven, all arms
interleaved); a faster arm has its final value there. This is one small model on one
task, and shows no more than that.

"""


def read(folder: pathlib.Path) -> list[tuple[Any, dict[str, Any]]]:
    """Returns (module, results) of every study that has results.

    Args:
      folder: has a folder for each study.

    Raises:
      ValueError: results at toy sizes.
    """
    found = []
    for name in STUDIES:
        path = folder / name / "results.json"
        if not path.exists():
            continue
        results = json.loads(path.read_text())
        if results["smoke"]:
            raise ValueError(
                f"{path} has results at toy sizes, which are only a smoke test; run "
                f"python -m experiments.studies.run --study={name} "
                "--study_dir=docs/results/studies"
            )
        module = importlib.import_module(f"experiments.studies.questions.{name}")
        found.append((module, results))
    return found


def section(module: Any, results: dict[str, Any]) -> str:
    """Returns a study's part of the page, without its figure.

    Args:
      module: the study's, for its docstring's first line, PAIRS and `notes`.
      results: the content of its `results.json`.
    """
    lines = [f"## {module.__doc__.splitlines()[0]}", "", results["question"], ""]
    arms, baseline = results["arms"], results["baseline"]
    if baseline in arms:
        lines += [table(results), ""]
    for one, other in getattr(module, "PAIRS", ()):
        if one in arms and other in arms:
            equal, timed = _differences(arms[one], arms[other], results)
            told = f"{equal} at equal steps, {timed} at equal wall time"
            lines.append(f"- {one} minus {other}: {told}")
    if baseline in arms and hasattr(module, "notes"):
        lines += [f"- {note}" for note in module.notes(results)]
    lines += [f"- Not run: {missing}" for missing in results["missing"]]
    lines += ["", cost(results)]
    return "\n".join(lines).replace("\n\n\n", "\n\n")


def table(results: dict[str, Any]) -> str:
    """Returns the arms as markdown, each compared with the baseline."""
    arms, baseline = results["arms"], results["baseline"]
    base, rows = arms[baseline], []
    for name, arm in arms.items():
        values = _final(arm)
        error = paired.standard_error(values)
        same = name == baseline
        rows.append(
            [
                name,
                f"{arm['rate']:.2g}",
                f"{values.mean():.4f} +- {error:.4f}",
                *(("-", "-") if same else _differences(arm, base, results)),
                f"{arm['ms'] / base['ms']:.2f}",
            ]
        )
    header = ["arm", "rate", "bits per byte", f"minus {baseline}, equal steps"]
    header += ["equal wall time", "time of a step"]
    return tables.markdown(header, rows)


def cost(results: dict[str, Any]) -> str:
    """Returns what the study cost, and the digests that identify its results."""
    configs = [arm["config"] for arm in results["arms"].values()]
    return (
        f"{results['steps']} steps, {results['runs']} runs, {results['cpu_hours']:.2f} "
        f"CPU-hours ({results['device']}, jax {results['jax']}); configs "
        f"{', '.join(config[:8] for config in configs)}."
    )


def _differences(
    arm: dict[str, Any], other: dict[str, Any], results: dict[str, Any]
) -> tuple[str, str]:
    """Returns paired differences of two arms, at equal steps and equal wall time."""
    goal, limit = _final(other), other["ms"] * results["steps"]
    values = _final(arm), _at(arm, limit, results["every"])
    equal, timed = (paired.difference(own - goal) for own in values)
    return equal, timed


def _final(arm: dict[str, Any]) -> np.ndarray:
    return np.array(arm["curves"])[:, -1]


def _at(arm: dict[str, Any], limit: float, every: int) -> np.ndarray:
    """Returns the seeds' values after `limit` milliseconds of training."""
    curves = np.array(arm["curves"])
    times = arm["ms"] * every * np.arange(1, curves.shape[1] + 1)
    return np.array([np.interp(limit, times, curve) for curve in curves])


def draw(docs: pathlib.Path = DOCS) -> None:
    """Draws the figure of every study that has results, in its folder."""
    folder = docs / "results" / "studies"
    for module, results in read(folder):
        panels.figure(results, folder / results["study"] / "figure.png", *module.PANELS)


def write(docs: pathlib.Path = DOCS) -> pathlib.Path:
    """Writes `results.md` into the docs folder and returns its path."""
    parts, hours = [], 0.0
    studies = read(docs / "results" / "studies")
    for module, results in studies:
        name = results["study"]
        picture = f"![{results['question']}](results/studies/{name}/figure.png)"
        head, _, rest = section(module, results).partition("\n\n")
        parts.append(f"{head}\n\n{picture}\n\n{rest}\n")
        hours += results["cpu_hours"]
    absent = sorted(set(STUDIES) - {results["study"] for _, results in studies})
    tail = f"All together {hours:.1f} CPU-hours."
    if absent:
        tail += f" Not run at all: {', '.join(absent)}."
    path = docs / "results.md"
    path.write_text(HEAD + "\n".join(parts) + f"\n{tail}\n")
    return path
