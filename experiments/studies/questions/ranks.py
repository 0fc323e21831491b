"""Rank, under alpha / r and under alpha / sqrt(r).

The claim: with the standard scaling larger ranks train alike ("collapse"), with
rsLoRA's they go on improving, at one learning rate for all. So two readings: every arm
at its own best rate (the table), and all at one rate (the figure's second panel).

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
    """Of an arm."""
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
"""Further pairs that the table holds against each other."""

CLAIMS = tuple(
    scorecard.Lower(
        "A large rank learns more under alpha / sqrt(r) than under alpha / r",
        "2312.03732",
        name(r, "rank_stabilized"),
        name(r, "standard"),
    )
    for r in RANKS[2:]
)
"""Of the paper."""


def by_rank(axis: Any, results: Any) -> None:
    """The final value by rank, each at its own best rate."""
    arms = {
        label: lambda rank, scaling=scaling: name(rank, scaling)
        for scaling, label in FORMS.items()
    }
    panels.by_size(axis, results, RANKS, arms)
    axis.set(xscale="log", xlabel="rank", title="best rate of each")
    panels.label_sizes(axis.xaxis, RANKS)


def at_one_rate(axis: Any, results: Any) -> None:
    """By rank at each fixed learning rate, on the selection split, one seed."""
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
    """What the paper claims of the arms."""
    return scorecard.of_arms(results, CLAIMS)
