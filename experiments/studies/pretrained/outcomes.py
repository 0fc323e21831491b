"""What an arm of the benchmark ended with: from the lines of its runs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from experiments.studies.method import comparison
from experiments.studies.pretrained import arms, bases

CHOOSING = 0
"""The seed that chooses a rate."""
SEEDS = (1, 2, 3)
"""Those that are reported."""
BASE = "base"
"""Name of the lines that are of the base as it was, and of no arm."""


class Outcome(NamedTuple):
    """A finished arm.

    Attributes:
      rate: that was chosen.
      scores: at that rate on the held-out rows, by seed, `[seeds]`; lower is better.
    """

    rate: float
    scores: np.ndarray


def finish(
    name: str,
    arm: arms.Arm,
    runs: comparison.Runs,
    make: Callable[[str, int, float], Any] | None = None,
) -> Outcome:
    """Returns an arm's outcome, its missing runs made.

    Args:
      name: of the arm.
      arm: whose rates are tried.
      runs: made so far.
      make: `(part, seed, rate) -> line`, part "choose" or "report"; None: the runs
        that are there must do.

    Raises:
      comparison.NotRun: a run is missing and may not be made.
    """

    def score(part: str, seed: int, rate: float) -> float:
        made = None if make is None else lambda: make(part, seed, rate)
        return runs.get((name, part, seed, rate), made)[-1]

    rate = comparison.best_of_grid(lambda r: score("choose", CHOOSING, r), arm.rates)
    return Outcome(rate, np.array([score("report", seed, rate) for seed in SEEDS]))


class Standing(NamedTuple):
    """How far a task is.

    Attributes:
      finished: arms by name, in the task's order.
      missing: of the others, how many runs are there.
      base: score of the base before it learns, where it was taken.
      bleu: by arm, where its texts were written.
      runs: their number.
      cpu_hours: of them.
    """

    finished: dict[str, Outcome]
    missing: dict[str, int]
    base: float | None
    bleu: dict[str, float]
    runs: int
    cpu_hours: float


def standing(task: bases.Task, runs: comparison.Runs) -> Standing:
    """Returns what the runs of a task say so far."""
    finished, missing = {}, {}
    for name, arm in bases.arms_of(task).items():
        try:
            finished[name] = finish(name, arm, runs)
        except comparison.NotRun:
            missing[name] = sum(key[0] == name for key in runs.lines)
    last = {key: line["curve"][-1] for key, line in runs.lines.items()}
    base = next((score for key, score in last.items() if key[0] == BASE), None)
    bleu = {str(key[0]): score for key, score in last.items() if key[1] == "write"}
    seconds = sum(line["cpu_seconds"] for line in runs.lines.values())
    return Standing(finished, missing, base, bleu, len(last), seconds / 3600)
