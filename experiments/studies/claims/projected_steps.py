"""LoRA-Pro: does it follow full fine-tuning, and does it end lower than LoRA?

    python -m experiments.studies.claims.projected_steps

The claim: the pair's step is full fine-tuning's step projected onto what the factors
can express, so the adapter follows full fine-tuning where LoRA does not. Students and
cosines are those of `walks`: one kernel 48 x 32, or two layers; noise 0, 1 and 4 on the
targets; adapters of rank 4, 32 examples per step, 150 steps.

Under "SGD, one rate" all arms use the rate that is best for full fine-tuning, as in the
theorem. Under "SGD" and "Adam" each arm has its own rate: the best on four seeds among
seven, a factor 2 apart, and up to three more while the best lies at the edge. Twelve
other seeds are reported, each paired with LoRA and full fine-tuning on the same seed.
The number after an arm is its damping; "rowcol" has momentum only where its name says
so. Full fine-tuning's own cosines are 1; for the change, its row shows the ceiling
instead: the cosine of its change to the best rank-4 part of it.

Under Adam, "full" is the paper's algorithm; "rowcol" and "factor" keep less state.
"rowcol" without momentum aims at steps without momentum, so its steps are far from
Adam's by design; for it, the claims only concern what the steps add up to.
"""

import functools
import hashlib
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from absl import app, flags

import lorax
from experiments import paired
from experiments.machine import tables
from experiments.studies.claims import walks
from experiments.studies.method import comparison, panels, scorecard
from lorax import optim

_MINUTES = flags.DEFINE_float("projected_minutes", None, "Time limit for new runs.")

STEPS = 150
PROBLEMS: dict[str, walks.Shapes] = {
    "one kernel": ((48, 32),),
    "two layers": ((48, 32), (32, 24)),
}
NOISES = (0.0, 1.0, 4.0)
CHOOSE, REPORT = tuple(range(100, 104)), tuple(range(12))
LATER, EARLY = slice(10, None), slice(2, 10)  # from step 11, and steps 3 to 10
DRAWN = slice(4, None, 5)  # steps 5, 10, 15 ...
MEASURES = ("step", "reachable", "early", "end")
RULES = ("SGD, one rate", "SGD", "Adam")
GRIDS = {
    "SGD": tuple(2.0**k for k in range(-6, 1)),
    "Adam": tuple(2.0**k for k in range(-10, -3)),
}
LORA = lorax.Target(".*", rank=walks.RANK, alpha=walks.RANK)


class Arm(NamedTuple):
    """What trains, and by which optimiser.

    Attributes:
      method: "whole" (full fine-tuning), "lora", or a mode of LoRA-Pro.
      damping: of LoRA-Pro.
      b1: of LoRA-Pro's momentum.
    """

    method: str
    damping: float = 0.0
    b1: float | None = None


def _damped(name: str, mode: str, b1: float | None = None) -> dict[str, Arm]:
    return {f"{name} {d:g}": Arm(mode, d, b1) for d in (0.1, 0.01, 0.001)}


PLAIN = {"full fine-tuning": Arm("whole"), "LoRA": Arm("lora")}
SGD = {**PLAIN, **_damped("LoRA-Pro", "sgd")}
ADAM = {
    **PLAIN,
    **_damped("LoRA-Pro, full", "full"),
    **_damped("LoRA-Pro, rowcol", "rowcol"),
    **_damped("LoRA-Pro, rowcol, momentum", "rowcol", 0.9),
    **_damped("LoRA-Pro, factor", "factor"),
}
ARMS = {"SGD, one rate": SGD, "SGD": SGD, "Adam": ADAM}
"""Rule -> name -> arm."""


class Cell(NamedTuple):
    """A setting in which arms are compared."""

    rule: str
    problem: str
    noise: float

    @property
    def optimizer(self) -> str:
        """Full fine-tuning's optimiser: "SGD" or "Adam"."""
        return self.rule.partition(",")[0]

    def __str__(self) -> str:
        return f"{self.rule}: {self.problem}, noise {self.noise:g}"


CELLS = tuple(itertools.starmap(Cell, itertools.product(RULES, PROBLEMS, NOISES)))


DREW = {
    Cell("SGD, one rate", "one kernel", 1.0): tuple(SGD),
    Cell("Adam", "one kernel", 1.0): (
        *PLAIN,
        "LoRA-Pro, full 0.01",
        "LoRA-Pro, rowcol 0.01",
        "LoRA-Pro, rowcol, momentum 0.01",
        "LoRA-Pro, factor 0.1",
    ),
}
"""Cell -> the arms in the figure."""
WITHOUT_MOMENTUM = "LoRA-Pro, rowcol 0.01"
CLAIMED = (
    ("SGD, one rate", "LoRA-Pro 0.01", "SGD at full fine-tuning's best rate"),
    ("SGD", "LoRA-Pro 0.01", "SGD"),
    ("Adam", "LoRA-Pro, full 0.01", "Adam"),
    ("Adam", WITHOUT_MOMENTUM, "Adam"),
    ("Adam", "LoRA-Pro, factor 0.1", "Adam"),
)
"""What the claim is tested on: rule, arm, and how the page names them."""
PREDICTED = {
    "step": (
        "LoRA-Pro's steps are closer to full fine-tuning's than LoRA's are",
        "cosine of the steps",
    ),
    "early": (
        "LoRA-Pro follows full fine-tuning from the start",
        "cosine of the changes after 3 to 10 steps",
    ),
    "end": (
        "LoRA-Pro ends closer to full fine-tuning than LoRA does",
        "cosine of the changes at the end",
    ),
    "error": ("LoRA-Pro ends lower than LoRA", "relative error"),
}
"""Measure -> (what is claimed, the number)."""


@functools.cache
def make_walk(problem: str, optimizer: str, method: str, b1: float | None) -> Any:
    """Returns the compiled walk that arms of the same form share."""
    whole = {"SGD": optax.sgd, "Adam": optax.adam}[optimizer]

    def make_tx(rate: Any, damping: Any) -> Any:
        if method in ("whole", "lora"):
            return whole(rate)
        mode: Any = method
        return optim.lora_pro(rate, mode, damping=damping, b1=b1)

    target = lorax.Target(".*", adapter="full") if method == "whole" else LORA
    return walks.make_walk(PROBLEMS[problem], target, make_tx, whole(1.0), STEPS)


def study(cell: Cell, runs: comparison.Runs) -> dict[str, dict[str, Any]]:
    """Makes a cell's missing runs, and returns its arms' results."""
    optimizer, grid = cell.optimizer, GRIDS[cell.optimizer]

    def walk(arm: Arm, seeds: Sequence[int], rate: float, reference: Any) -> Any:
        made = make_walk(cell.problem, optimizer, arm.method, arm.b1)
        return made(np.asarray(seeds), cell.noise, rate, arm.damping, reference)

    def chosen(name: str, arm: Arm) -> tuple[float, dict[str, float]]:
        key = name, optimizer, cell.problem, cell.noise
        scores: dict[str, float] = {}

        def errors(rate: float) -> Any:
            return walk(arm, CHOOSE, rate, _nothing(cell, len(CHOOSE))).error

        def score(rate: float) -> float:
            made = functools.partial(errors, rate)
            found = runs.get((*key, "choose", rate), made)
            scores[f"{rate:.3g}"] = mean = float(np.mean(found))
            return mean

        return comparison.best_of_grid(score, grid), scores

    arms = ARMS[cell.rule]
    common, _ = chosen("full fine-tuning", arms["full fine-tuning"])
    reference = functools.cache(lambda few: _whole(cell, few, common))
    found = {}
    for name, arm in arms.items():
        rate, scores = common, dict[str, float]()
        if cell.rule == optimizer:
            rate, scores = chosen(name, arm)

        def made(arm: Arm = arm, rate: float = rate) -> dict[str, Any]:
            few = np.asarray(REPORT).reshape(-1, len(CHOOSE)).tolist()
            parts = [
                _measured(cell, walk(arm, seeds, rate, reference(tuple(seeds))), arm)
                for seeds in few
            ]
            return {k: sum((part[k] for part in parts), []) for k in parts[0]}

        key = (name, cell.rule, cell.problem, cell.noise, "report", rate)
        line = runs.line(key, made)
        path = np.mean(line["path"], 0).round(4).tolist()
        found[name] = {
            **{"rate": rate, "grid": scores, "error": line["curve"], "path": path},
            **{measure: line[measure] for measure in MEASURES},
        }
    return found


def _nothing(cell: Cell, seeds: int) -> np.ndarray:
    """Returns zeros in place of a reference."""
    return np.zeros((seeds, STEPS, walks.entries(PROBLEMS[cell.problem])), np.float32)


def _whole(cell: Cell, seeds: Sequence[int], rate: float) -> jax.Array:
    """Returns the changes of full fine-tuning, `[seeds, steps, entries]`."""
    made = make_walk(cell.problem, cell.optimizer, "whole", None)
    none = _nothing(cell, len(seeds))
    return made(np.asarray(seeds), cell.noise, rate, 0.0, none).changes


def _measured(cell: Cell, walk: walks.Walk, arm: Arm) -> dict[str, Any]:
    """Returns what a line keeps, by seed; for full fine-tuning, with the ceilings."""
    step, change = np.asarray(walk.step), np.asarray(walk.change)
    if arm.method == "whole":  # then its changes are the reference
        shapes = PROBLEMS[cell.problem]
        change = np.array(
            [
                [walks.best_of_rank(c, shapes) for c in changes]
                for changes in np.asarray(walk.changes)
            ]
        )
    return {
        "curve": _short(walk.error),
        "step": _short(step[:, LATER].mean(1)),
        "reachable": _short(np.asarray(walk.reachable)[:, LATER].mean(1)),
        "early": _short(change[:, EARLY].mean(1)),
        "end": _short(change[:, -1]),
        "path": _short(change[:, DRAWN]),
    }


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the markdown table of a cell."""
    header = ["arm", "rate", "error", "minus LoRA (95 %)", "step's cosine", "reachable"]
    header += ["change's, steps 3 to 10", "change's, at the end"]
    rows = []
    for name, own in found.items():
        off = np.array(own["error"]) - np.array(found["LoRA"]["error"])
        rows.append(
            [
                name,
                f"{own['rate']:.2g}",
                f"{np.mean(own['error']):.4f}",
                "-" if name == "LoRA" else paired.difference(off),
                *(f"{np.mean(own[measure]):.2f}" for measure in MEASURES),
            ]
        )
    return tables.markdown(header, rows)


def _short(values: Any) -> list[Any]:
    """Rounds numbers to five digits, so that the file of runs stays small."""
    return np.vectorize(lambda x: float(f"{x:.5g}"))(np.asarray(values)).tolist()


def digest(arm: Arm) -> str:
    """Returns a digest of what an arm's runs depend on, besides the cell."""
    sizes = STEPS, PROBLEMS, walks.RANK, walks.BATCH, walks.HELD_OUT, CHOOSE, REPORT
    told = json.dumps([arm, sizes, LATER.start, EARLY.start, EARLY.stop])
    return hashlib.sha256((told + jax.__version__).encode()).hexdigest()[:16]


def results(runs: comparison.Runs) -> dict[str, Any]:
    """Returns what every cell found, by its name, and the cost."""
    cells: dict[str, Any] = {}
    for cell in CELLS:
        try:
            cells[str(cell)] = study(cell, runs)
        except comparison.NotRun as error:
            print(f"CUT SHORT, not run: {cell}: {error}")
    seconds = sum(line["cpu_seconds"] for line in runs.lines.values())
    return {"cells": cells, "cpu_seconds": round(seconds)}


def page(found: Mapping[str, Any]) -> str:
    """Returns the tables of all cells."""
    parts = [f"## {cell}\n\n{table(own)}\n" for cell, own in found["cells"].items()]
    cost = f"{found['cpu_seconds']} CPU-seconds.\n"
    return "\n".join([comparison.heading(__doc__, "figure.png"), *parts, cost])


def claims(found: Mapping[str, Any]) -> list[scorecard.Claim]:
    """Returns the paper's claims, over both problems and the noisy targets together."""

    def off(rule: str, name: str, measure: str) -> np.ndarray:
        cells = [found["cells"][str(c)] for c in CELLS if c.rule == rule and c.noise]
        differences = [
            np.subtract(cell[name][measure], cell["LoRA"][measure]) for cell in cells
        ]
        return np.mean(differences, 0)

    rows = []
    for rule, name, told in CLAIMED:
        for measure, (claimed, number) in PREDICTED.items():
            if measure == "step" and name == WITHOUT_MOMENTUM:
                continue
            side = {"high": 0.0} if measure == "error" else {"low": 0.0}
            whose = f"{number}, {name} minus LoRA; teachers, {told}"
            values = off(rule, name, measure)
            rows.append(scorecard.Claim(claimed, "2407.18242", whose, values, **side))
    return rows


def draw(found: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draws the cosine of the change so far, by step, and its ceiling."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (4.6 * len(DREW), 4.2)
    figure, axes = plt.subplots(1, len(DREW), figsize=size, layout="constrained")
    for axis, (cell, names) in zip(np.atleast_1d(axes), DREW.items(), strict=True):
        for colour, name in zip(tables.COLOURS, names, strict=False):
            curve = found["cells"][str(cell)][name]["path"]
            steps = np.arange(1, STEPS + 1)[DRAWN]
            whole = name == "full fine-tuning"
            label = "its best part of rank 4" if whole else name
            look = {"color": "black", "linestyle": ":"} if whole else {"color": colour}
            axis.plot(steps, curve, label=label, **look)
        axis.set(title=cell, xlabel="step", ylabel="cosine to full's change")
        axis.legend()
        panels.tidy(axis)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str]) -> None:
    """Resumes the study, and writes results, tables and figure."""
    del argv
    folder = comparison.folder("projected_steps")
    digests = {name: digest(arm) for name, arm in (SGD | ADAM).items()}
    runs = comparison.Runs(folder / "runs.jsonl", digests, _MINUTES.value)
    found = results(runs)
    comparison.publish(folder, found, page)
    draw(found, folder / "figure.png")


if __name__ == "__main__":
    app.run(main)
