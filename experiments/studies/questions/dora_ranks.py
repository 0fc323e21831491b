"""DoRA against LoRA at low rank.

The claim: the magnitude makes up for rank, the more so the lower the rank.

References:
  Liu et al., DoRA, arXiv:2402.09353: robustness to the rank.
"""

from typing import Any

from experiments.studies.method import panels, scorecard, text

RANKS = (1, 2, 4)


def name(method: str, rank: int) -> str:
    """Returns the name of an arm."""
    return f"{method} r = {rank}"


STUDY = text.Study(
    "dora_ranks",
    "Is DoRA ahead of LoRA, and more so at low rank?",
    {
        name(method, rank): {
            "adapter.adapter": method.lower(),
            "adapter.rank": rank,
            "adapter.alpha": 2.0 * rank,
        }
        for method in ("LoRA", "DoRA")
        for rank in RANKS
    },
    name("LoRA", 2),
)
PAIRS = tuple((name("DoRA", rank), name("LoRA", rank)) for rank in RANKS)
"""Further pairs that the page compares."""

CLAIMS = tuple(
    scorecard.Lower(
        "At a low rank, DoRA learns more than LoRA",
        "2402.09353",
        name("DoRA", rank),
        name("LoRA", rank),
    )
    for rank in RANKS
)
"""The paper's claims."""


def by_rank(axis: Any, results: Any) -> None:
    """Draws the final value by rank."""
    arms = {
        method: lambda rank, method=method: name(method, rank)
        for method in ("LoRA", "DoRA")
    }
    panels.by_size(axis, results, RANKS, arms)
    axis.set(xscale="log", xlabel="rank")
    panels.label_sizes(axis.xaxis, RANKS)


PANELS = (by_rank, panels.curves)


def claims(results: Any) -> list[scorecard.Claim]:
    """Returns what the paper claims about the arms."""
    return scorecard.of_arms(results, CLAIMS)
