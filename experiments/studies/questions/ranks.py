"""Rank, under alpha / r and under alpha / sqrt(r).

The claim: at one learning rate for all, larger ranks train alike with the standard
scaling ("collapse"), and keep improving with rsLoRA's. So there are two readings: every
arm at its own best rate (the table), and all at one rate (the figure's second panel).

References:
  Kalajdzievski, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA,
  arXiv:2312.03732, figures 1 and 2.
"""

from typing import Any

from experiments.machine import tables
from experiments.studies.method import panels, scorecard, text

RANKS = (2, 8, 32, 128)
FORMS = {"standard": "alpha / r", "rank_stabilized": "alpha / sqrt(r)"}


def name(rank: int, scaling: str) -> str:
    """Returns the name of an arm."""
    return f"r = {rank}" + (", rs" if scaling == "rank_stabilized" else "")


STUDY = text.Study(
    "ranks",
    "Does a larger rank learn more, and does it need rsLoRA's scale?",
    {
        name(rank, scaling): {"adapter.rank": rank, "adapter.scaling": scaling}
        for scaling in FORMS
        for rank in RANKS
    },
    name(8, "standard"),
)

PAIRS = tuple((name(r, "rank_stabilized"), name(r, "standard")) for r in RANKS)
"""Further pairs that the page compares."""

CLAIMS = tuple(
    scorecard.Lower(
        "A large rank learns more under alpha / sqrt(r) than under alpha / r",
        "2312.03732",
        name(r, "rank_stabilized"),
        name(r, "standard"),
    )
    for r in RANKS[2:]
)
"""The paper's claims."""


def by_rank(axis: Any, results: Any) -> None:
    """Draws the final value by rank, each at its own best rate."""
    arms = {
        label: lambda rank, scaling=scaling: name(rank, scaling)
        for scaling, label in FORMS.items()
    }
    panels.by_size(axis, results, RANKS, arms)
    axis.set(xscale="log", xlabel="rank", title="best rate of each")
    panels.label_sizes(axis.xaxis, RANKS)


def at_one_rate(axis: Any, results: Any) -> None:
    """Draws scores by rank at each fixed rate, on the selection split, for one seed."""
    colours, seen = tables.COLOURS, []
    for (scaling, label), line in zip(FORMS.items(), ("-", "--"), strict=True):
        for colour, rate in zip(colours, text.GRID, strict=False):
            pairs = [
                (r, results["arms"][name(r, scaling)]["grid"].get(f"{rate:.3g}"))
                for r in RANKS
                if name(r, scaling) in results["arms"]
            ]
            pairs = [pair for pair in pairs if pair[1] is not None]
            if pairs:
                told = f"{label}, {rate:.2g}"
                axis.plot(*zip(*pairs, strict=True), line, color=colour, label=told)
                seen += [value for _, value in pairs]
    axis.set(xscale="log", xlabel="rank", ylabel=f"{panels.BITS} (selection)")
    axis.set(title="one rate for all")
    panels.label_sizes(axis.xaxis, RANKS)
    if seen:
        panels.leave_out_diverged(axis, seen)
    axis.legend(fontsize=6, ncols=2, loc="upper center")


PANELS = (by_rank, at_one_rate)


def claims(results: Any) -> list[scorecard.Claim]:
    """Returns what the paper claims about the arms."""
    return scorecard.of_arms(results, CLAIMS)
