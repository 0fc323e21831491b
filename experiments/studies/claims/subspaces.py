"""LoRA: do adapters of two ranks, and of two seeds, learn the same directions?

    python -m experiments.studies.claims.subspaces

The benchmark's all-MiniLM-L6-v2 (22.7 million parameters) learns banking77 with
adapters on all 36 linear kernels, of ranks 8 and 64 with the same scale, at the rate
that is best for rank 8 there: 150 steps of 16 sentences. For every kernel:

    rank 8 and 64    phi(1, 1) and phi(8, 8) of the two updates (`lorax.analysis`), on
                     the input side: 1 where their leading directions agree, and 1/n and
                     8/n for random directions in n dimensions
    two seeds        the same for two updates of rank 64
    amplification    |D| / |U^T W V|: what the update D = U S V^T adds, over what the
                     kernel W already has in those directions
    stable rank      |D|^2 / |D|_2^2, at most the adapter's rank; also of the LoRA
                     authors' own adapter: RoBERTa on MNLI, rank 8, 24 kernels

Intervals are over the kernels, of one pair of seeds.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

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

RANKS = (8, 64)
SCALE = arms.ALPHA / arms.RANK
RATE, STEPS = 10**-3, 150
AUTHORS = "roberta_lora_mnli/roberta_base_lora_mnli.safetensors"
MNLI = "stable rank, the authors' MNLI adapter"
PAIRS = ((1, 2),)
"""Pairs of seeds to compare."""
WHICH = ((1, 1), (8, 8))
"""Numbers of leading directions of the two updates."""


def train(setting: bases.Setting, rank: int, seed: int) -> Any:
    """Returns the trained adapters, and the base that they change."""
    fields = {
        "adapter.rank": rank,
        "adapter.alpha": SCALE * rank,
        "run.steps": STEPS,
        "optimizer.warmup_steps": STEPS // 10,
    }
    arm = arms.Arm(fields, (RATE,), "")
    config = bases.configured(bases.TASKS["banking77"], arm)
    run = trial.make_run(config, setting.loss_fn, setting.base, setting.train)
    kept: list[Any] = []

    def watch(seed: int, step: int, state: Any, params: Any) -> None:
        low_rank = {k: a for k, a in state.adapters.items() if not a.replaces}
        kept.append((low_rank, params))

    run(seed, RATE, lambda params: 0.0, STEPS, watch)
    return kept[-1]


def measure(setting: bases.Setting, seeds: tuple[int, int]) -> dict[str, Any]:
    """Returns the numbers of a pair of seeds, each `{kernel: value}`."""
    found: dict[str, dict[str, float]] = {}
    (low, params), (high, _) = (train(setting, rank, seeds[0]) for rank in RANKS)
    other, _ = train(setting, RANKS[1], seeds[1])
    for name, one, two in (("rank 8 and 64", low, high), ("two seeds", high, other)):
        for path, phi in analysis.subspace_similarity(one, two, of="in").items():
            for i, j in WHICH:
                own = found.setdefault(f"{name}: phi({i}, {j})", {})
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


def study(setting: Any, runs: comparison.Runs) -> dict[str, Any]:
    """Makes missing runs, and returns the means over the pairs."""
    lines = []
    for seeds in PAIRS:

        def made(seeds: tuple[int, int] = seeds) -> dict[str, Any]:
            numbers = measure(setting(), seeds)
            first = next(iter(numbers.values()))
            return {"curve": [np.mean(list(first.values()))], "numbers": numbers}

        try:
            lines.append(runs.line(("MiniLM", *seeds), made)["numbers"])
        except comparison.NotRun as error:
            print(f"CUT SHORT, not run: seeds {error}")
    found = {
        name: {
            path: float(np.mean([line[name][path] for line in lines])) for path in own
        }
        for name, own in lines[0].items()
    }
    return found | {MNLI: authors()}


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
    cost = f"{found['cpu_seconds']} CPU-seconds.\n"
    return "\n".join([comparison.heading(__doc__), table(found["numbers"]), "", cost])


def claims(found: Mapping[str, Any]) -> list[scorecard.Claim]:
    """Returns the claims of the paper's section 7."""

    def of(name: str) -> np.ndarray:
        return np.array(list(found["numbers"][name].values()))

    paper, where = "2106.09685", "MiniLM on banking77, 36 kernels"
    factors = [of(f"amplification, rank {rank}") for rank in RANKS]
    return [
        scorecard.Claim(
            "Rank 8 and rank 64 share more than half of their leading direction",
            paper,
            f"phi(1, 1) of the updates; {where}",
            of("rank 8 and 64: phi(1, 1)"),
            low=0.5,
        ),
        scorecard.Claim(
            "Two seeds share more directions than random updates do",
            paper,
            f"phi(8, 8) of two updates of rank 64 minus 8/384; {where}",
            of("two seeds: phi(8, 8)") - 8 / 384,
            low=0.0,
        ),
        scorecard.Claim(
            "An update amplifies directions that are weak in the kernel",
            paper,
            f"log2 of the amplification at rank 8; {where}",
            np.log2(factors[0]),
            low=0.0,
        ),
        scorecard.Claim(
            "A lower rank amplifies more",
            paper,
            f"log2 of the amplification, rank 8 minus 64; {where}",
            np.log2(factors[0] / factors[1]),
            low=0.0,
        ),
        scorecard.Claim(
            "An update of rank 8 has a small intrinsic rank",
            paper,
            "stable rank of the authors' own adapter, RoBERTa on MNLI, 24 kernels",
            of(MNLI),
            high=4.0,
        ),
        scorecard.Claim(
            "An update of rank 64 has a small intrinsic rank",
            paper,
            f"stable rank of the updates; {where}",
            of("stable rank, rank 64"),
            high=8.0,
        ),
    ]


def digest() -> str:
    """Returns a digest of what a run depends on."""
    shared = {**bases.SHARED, **bases.TASKS["banking77"].fields}
    told = [shared, RANKS, SCALE, RATE, STEPS, WHICH, jax.__version__]
    line = json.dumps(told, sort_keys=True, default=str)
    return hashlib.sha256(line.encode()).hexdigest()[:16]


def main(argv: Sequence[str]) -> None:
    """Resumes the study, and writes results and table."""
    del argv
    folder = comparison.folder("subspaces")
    runs = comparison.Runs(folder / "runs.jsonl", {"MiniLM": digest()}, _MINUTES.value)
    numbers = study(lambda: bases.make_setting(bases.TASKS["banking77"]), runs)
    seconds = sum(line["cpu_seconds"] for line in runs.lines.values())
    found = {"numbers": numbers, "cpu_seconds": round(seconds)}
    comparison.publish(folder, found, page)


if __name__ == "__main__":
    app.run(main)
