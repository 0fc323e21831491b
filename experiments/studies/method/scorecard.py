"""The page `docs/results/claims.md`: what papers claim, and what was found here.

A claim predicts a range for a number, and a study measures that number with its 95 %
interval. The claim is "shown" if the interval lies in the range, "contradicted" if it
lies outside, and else "not shown".
"""

import importlib
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import paired
from experiments.machine import tables

SOURCES = {
    "claims/projected_steps": "experiments.studies.claims.projected_steps",
    "claims/width_exponent": "experiments.studies.claims.width_exponent",
    "claims/unequal_ranks": "experiments.studies.claims.unequal_ranks",
    "claims/subspaces": "experiments.studies.claims.subspaces",
    "claims/one_step": "experiments.studies.claims.one_step",
    "claims/batch_rates": "experiments.studies.claims.batch_rates",
    **{
        f"studies/{name}": f"experiments.studies.questions.{name}"
        for name in (
            *("trajectories", "budgets", "ranks", "matrices", "dora_ranks", "inits"),
        )
    },
}
"""Folder in `docs/results` -> its module, which has `claims(results) -> [Claim]`."""

HEAD = """# What papers claim, and what was found here

Written by `python -m experiments.report` from the results of the studies; the last
column links the runs. A number is a mean over seeds, over kernels where its row says
so, or, of one step, over batches (jackknife), with its 95 % interval (Student's t).
Differences are paired, and each arm has the best of its own learning rates unless a row
says otherwise; the number after LoRA-Pro is its damping. **Shown**: the interval lies
where the claim puts the number. **Contradicted**: it lies outside. **Not shown**: it
covers both. The problems are exact or small, the largest of them pretrained models of
22.7 and 135 million parameters, and each row names its own: a verdict holds for that
one, and no further.

"""


class Claim(NamedTuple):
    """What a paper claims about a number.

    Attributes:
      claimed: a sentence.
      paper: its arXiv number, or a URL.
      number: what was measured, and where.
      values: the measured values, `[seeds]`.
      low, high: the range that the claim predicts.
    """

    claimed: str
    paper: str
    number: str
    values: Sequence[float] | np.ndarray
    low: float = -math.inf
    high: float = math.inf


class Lower(NamedTuple):
    """A claim that an arm of the byte model ends lower than another."""

    claimed: str
    paper: str
    arm: str
    other: str


def of_arms(results: Mapping[str, Any], pairs: Sequence[Lower]) -> list[Claim]:
    """Returns the claims whose two arms have run: bits per byte, one minus the other.

    Args:
      results: as `text.results` returns them.
      pairs: what is claimed.
    """
    arms, found = results["arms"], []
    for claimed, paper, arm, other in pairs:
        if arm in arms and other in arms:
            ends = [np.array(arms[name]["curves"])[:, -1] for name in (arm, other)]
            told = f"bits per byte, {arm} minus {other}; byte model"
            number = f"{told}, {results['steps']} steps"
            found.append(Claim(claimed, paper, number, ends[0] - ends[1], high=0.0))
    return found


def verdict(claim: Claim) -> str:
    """Returns "shown", "not shown" or "contradicted"."""
    mean, half = paired.interval(np.asarray(claim.values))
    if not math.isfinite(half):
        return "not shown"
    if claim.low <= mean - half and mean + half <= claim.high:
        return "shown"
    apart = mean + half < claim.low or claim.high < mean - half
    return "contradicted" if apart else "not shown"


def row(claim: Claim, runs: str) -> list[str]:
    """Returns the cells of a claim's row; `runs` is the path to the runs."""
    mean, half = paired.interval(np.asarray(claim.values))
    page = (
        claim.paper if "//" in claim.paper else f"https://arxiv.org/abs/{claim.paper}"
    )
    return [
        f"{claim.claimed} ([{claim.paper.rpartition('//')[2]}]({page}))",
        claim.number,
        f"{mean:+.3f}",
        f"{mean - half:+.3f} to {mean + half:+.3f}",
        verdict(claim),
        f"[runs]({runs})",
    ]


def cost(folder: str, module: Any, found: Mapping[str, Any]) -> str:
    """Returns a study's line: its page, CPU-seconds, and the command to resume it."""
    what = module.__doc__.splitlines()[0].rstrip(".")
    parent, _, name = folder.partition("/")
    if parent == "studies":  # of the byte model: one command, one page
        page, seconds = "../results.md", 3600 * found["cpu_hours"]
        command = (
            f"experiments.studies.run --study={name} --study_dir=docs/results/studies"
        )
    else:
        page, seconds = f"{folder}/table.md", found["cpu_seconds"]
        command = f"{module.__name__} --study_dir=docs/results/{folder}"
    return f"- [{what}]({page}): {seconds:.0f} CPU-seconds, `python -m {command}`"


def read(results: pathlib.Path) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yields (folder, module, results) of every source that has results.

    Args:
      results: the folder `docs/results`.

    Raises:
      ValueError: results at toy sizes.
    """
    for folder, name in SOURCES.items():
        path = results / folder / "results.json"
        if path.exists():
            found = json.loads(path.read_text())
            if found.get("smoke"):
                raise ValueError(f"{path} is at toy sizes: run {name} in full")
            yield folder, importlib.import_module(name), found


def write(docs: pathlib.Path) -> pathlib.Path:
    """Writes `results/claims.md` into the docs folder and returns its path."""
    rows, costs = [], []
    for folder, module, found in read(docs / "results"):
        claims = module.claims(found)
        rows += [row(claim, f"{folder}/runs.jsonl") for claim in claims]
        costs.append(cost(folder, module, found))
    header = ["claimed", "number", "found", "95 % interval", "verdict", "file"]
    path = docs / "results" / "claims.md"
    table = tables.markdown(header, rows)
    path.write_text(f"{HEAD}{table}\n\n## The studies\n\n" + "\n".join(costs) + "\n")
    return path
