"""LoRA: do adapters of two ranks, and of two seeds, learn the same directions?

    python -m experiments.studies.claims.subspaces

Two of the benchmark's tasks: all-MiniLM-L6-v2 (22.7 million parameters) on banking77,
150 steps of 16 sentences, and SmolLM2-135M on E2E, 40 steps of 8 texts. Adapters of
ranks 8 and 64 with the same scale are on all linear kernels (36 and 210), and train at
the rate that is best for rank 8 there. For every kernel:

    rank 8 and 64    phi(1, 1) and phi(8, 8) of the two updates (`lorax.analysis`): 1
                     where their leading directions agree, and 1/n and 8/n for random
                     directions in n dimensions. "in" is the input side, where a is
                     drawn at random at the start; "out" the output side, where b is 0
    two seeds        the same for two updates of rank 64
    amplification    |D| / |U^T W V|: what the update D = U S V^T adds, over what the
                     kernel W already has in those directions
    stable rank      |D|^2 / |D|_2^2, at most the adapter's rank; also of the LoRA
                     authors' own adapter: RoBERTa on MNLI, rank 8, 24 kernels

Intervals are over the kernels, of one pair of seeds.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from absl import app, flags

from experiments import paired
from experiments.data.sources import paths
from experiments.machine import tables
from experiments.studies.method import comparison, scorecard, trial
from experiments.studies.pretrained import arms, bases
from lorax import analysis
from lorax.interop import loralib
from lorax.models import roberta

_MINUTES = flags.DEFINE_float("subspace_minutes", None, "Time limit for new runs.")


class Problem(NamedTuple):
    """A task of the benchmark.

    Attributes:
      task: its name there.
      steps: of a run.
      widths: the fewest dimensions that a kernel reads, and writes.
    """

    task: str
    steps: int
    widths: tuple[int, int]


PROBLEMS = {
    "MiniLM on banking77": Problem("banking77", 150, (384, 384)),
    "SmolLM2 on E2E": Problem("e2e", bases.STEPS, (576, 192)),
}
PAPER = "2106.09685"
RANKS = (8, 64)
SCALE = arms.ALPHA / arms.RANK
RATE = 10**-3
AUTHORS = "roberta_lora_mnli/roberta_base_lora_mnli.safetensors"
PAIRS = ((1, 2),)
"""Pairs of seeds to compare."""
WHICH = ((1, 1), (8, 8))
"""Numbers of leading directions of the two updates."""
SIDES: tuple[Literal["in", "out"], ...] = ("in", "out")

Numbers = dict[str, dict[str, float]]
"""Name -> kernel -> value."""


def train(setting: bases.Setting, problem: Problem, rank: int, seed: int) -> Any:
    """Returns the trained adapters, and the base that they change."""
    fields = {
        "adapter.rank": rank,
        "adapter.alpha": SCALE * rank,
        "run.steps": problem.steps,
        "optimizer.warmup_steps": problem.steps // 10,
    }
    arm = arms.Arm(fields, (RATE,), "")
    config = bases.configured(bases.TASKS[problem.task], arm)
    run = trial.make_run(config, setting.loss_fn, setting.base, setting.train)
    kept: list[Any] = []

    def watch(seed: int, step: int, state: Any, params: Any) -> None:
        low_rank = {k: a for k, a in state.adapters.items() if not a.replaces}
        kept.append((low_rank, params))

    run(seed, RATE, lambda params: 0.0, problem.steps, watch)
    return kept[-1]


def measure(
    setting: bases.Setting, problem: Problem, seeds: tuple[int, int]
) -> Numbers:
    """Returns the numbers of a pair of seeds."""
    found: Numbers = {}
    low, params = train(setting, problem, RANKS[0], seeds[0])
    high, other = (train(setting, problem, RANKS[1], seed)[0] for seed in seeds)
    for name, one, two in (("rank 8 and 64", low, high), ("two seeds", high, other)):
        for side in SIDES:
            for path, phi in analysis.subspace_similarity(one, two, of=side).items():
                for i, j in WHICH:
                    own = found.setdefault(f"{name}, {side}: phi({i}, {j})", {})
                    own |= _by_layer(path, phi[..., i - 1, j - 1])
    for rank, adapters in zip(RANKS, (low, high), strict=True):
        amplified = analysis.amplification(jax.random.key(0), adapters, params)
        own = found.setdefault(f"amplification, rank {rank}", {})
        for path, factors in amplified.items():
            own |= _by_layer(path, factors.factor)
        found[f"stable rank, rank {rank}"] = _stable_ranks(adapters)
    return found


def authors() -> dict[str, float]:
    """The stable ranks of the LoRA authors' own updates, by kernel."""
    config = roberta.Config(labels=3)
    adapters = loralib.load(paths.root() / AUTHORS, config, alpha=16)
    return _stable_ranks({k: a for k, a in adapters.items() if not a.replaces})


def _stable_ranks(adapters: Any) -> dict[str, float]:
    found: dict[str, float] = {}
    for path, values in analysis.singular_values(adapters).items():
        found |= _by_layer(path, analysis.stable_rank(values))
    return found


def _by_layer(path: str, values: Any) -> dict[str, float]:
    """Returns the values of a stack of kernels, by path and layer."""
    layers = enumerate(np.ravel(values))
    return {f"{path}, layer {layer}": float(value) for layer, value in layers}


def study(
    make_setting: Callable[[bases.Task], Any], runs: comparison.Runs
) -> dict[str, Numbers]:
    """Makes missing runs, and returns the means over the pairs, by problem."""
    found = {name: _means(name, make_setting, runs) for name in PROBLEMS}
    return {name: numbers for name, numbers in found.items() if numbers}


def _means(
    name: str, make_setting: Callable[[bases.Task], Any], runs: comparison.Runs
) -> Numbers:
    lines, problem = [], PROBLEMS[name]
    for seeds in PAIRS:

        def made(seeds: tuple[int, int] = seeds) -> dict[str, Any]:
            setting = make_setting(bases.TASKS[problem.task])
            numbers = measure(setting, problem, seeds)
            first = next(iter(numbers.values()))
            return {"curve": [np.mean(list(first.values()))], "numbers": numbers}

        try:
            lines.append(runs.line((name, *seeds), made)["numbers"])
        except comparison.NotRun as error:
            print(f"CUT SHORT, not run: {name}, seeds {error}")
    return {
        number: {
            path: float(np.mean([line[number][path] for line in lines])) for path in own
        }
        for number, own in (lines[0] if lines else {}).items()
    }


def table(numbers: Mapping[str, Mapping[str, float]]) -> str:
    """Returns each number's mean over kernels with its interval, least and largest."""
    rows = []
    for name, own in numbers.items():
        values = np.array(list(own.values()))
        mean, half = paired.interval(values)
        ends = [f"{values.min():.3f}", f"{values.max():.3f}"]
        rows.append([name, f"{mean:.3f} +- {half:.3f}", *ends])
    return tables.markdown(["number", "mean (95 %)", "least", "largest"], rows)


def page(found: Mapping[str, Any]) -> str:
    """Returns the study's page."""
    parts = [comparison.heading(__doc__)]
    told = found["numbers"] | {
        "The authors' RoBERTa on MNLI": {"stable rank": found["authors"]}
    }
    for name, numbers in told.items():
        parts += [f"## {name}\n", table(numbers), ""]
    return "\n".join([*parts, f"{found['cpu_seconds']} CPU-seconds.\n"])


def claims(found: Mapping[str, Any]) -> list[scorecard.Claim]:
    """Returns the claims of the paper's section 7."""
    own = scorecard.Claim(
        "An update of rank 8 has a small intrinsic rank",
        PAPER,
        "stable rank of the authors' own adapter, RoBERTa on MNLI, 24 kernels",
        np.array(list(found["authors"].values())),
        high=4.0,
    )
    made = (_claims(name, numbers) for name, numbers in found["numbers"].items())
    return [*itertools.chain.from_iterable(made), own]


def _claims(name: str, numbers: Numbers) -> list[scorecard.Claim]:
    """What is claimed of a problem's numbers."""

    def of(number: str) -> np.ndarray:
        return np.array(list(numbers[number].values()))

    where = f"{name}, {len(of(f'stable rank, rank {RANKS[0]}'))} kernels"
    factors = [np.log2(of(f"amplification, rank {rank}")) for rank in RANKS]
    share = "Rank 8 and rank 64 share more than half of their leading direction"
    alike = "Two seeds share more directions than random updates do"
    sides = zip(SIDES, ("inputs", "outputs"), PROBLEMS[name].widths, strict=True)
    by_side = [
        claim
        for side, which, width in sides
        for claim in (
            scorecard.Claim(
                share,
                PAPER,
                f"phi(1, 1) of the updates, {which}; {where}",
                of(f"rank 8 and 64, {side}: phi(1, 1)"),
                low=0.5,
            ),
            scorecard.Claim(
                alike,
                PAPER,
                f"phi(8, 8) of updates of rank 64 minus 8/{width}, {which}; {where}",
                of(f"two seeds, {side}: phi(8, 8)") - 8 / width,
                low=0.0,
            ),
        )
    ]
    return [
        *by_side,
        scorecard.Claim(
            "An update amplifies directions that are weak in the kernel",
            PAPER,
            f"log2 of the amplification at rank 8; {where}",
            factors[0],
            low=0.0,
        ),
        scorecard.Claim(
            "A lower rank amplifies more",
            PAPER,
            f"log2 of the amplification, rank 8 minus 64; {where}",
            factors[0] - factors[1],
            low=0.0,
        ),
        scorecard.Claim(
            "An update of rank 64 has a small intrinsic rank",
            PAPER,
            f"stable rank of the updates; {where}",
            of("stable rank, rank 64"),
            high=8.0,
        ),
    ]


def digests() -> dict[str, str]:
    """Returns a digest of what a run depends on, by problem."""
    made = {}
    for name, problem in PROBLEMS.items():
        shared = {**bases.SHARED, **bases.TASKS[problem.task].fields}
        told = [shared, RANKS, SCALE, RATE, problem.steps, WHICH, SIDES]
        made[name] = comparison.digest(*told, jax.__version__)
    return made


def main(argv: Sequence[str]) -> None:
    """Resumes the study, and writes results and table."""
    del argv
    folder = comparison.folder("subspaces")
    runs = comparison.Runs(folder / "runs.jsonl", digests(), _MINUTES.value)
    numbers = study(bases.make_setting, runs)
    seconds = round(sum(line["cpu_seconds"] for line in runs.lines.values()))
    found = {"numbers": numbers, "authors": authors(), "cpu_seconds": seconds}
    comparison.publish(folder, found, page)


if __name__ == "__main__":
    app.run(main)
