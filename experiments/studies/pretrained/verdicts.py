"""Claims about the methods, held against the outcomes: found, interval, verdict.

A difference is of paired seeds, with Student's 95 % interval. A claim is "shown" where
the interval lies within what it says, "contradicted" where it lies without, else "not
shown"; "not run" where an arm that it needs is missing.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments import paired
from experiments.studies.pretrained import outcomes

Finished = Mapping[str, outcomes.Outcome]
NEAR = 2.0  # percent: the larger of "within 1 to 2 %"
KEPT = 0.9
MATCHED = 1.0  # percent by which a variant may be better and LoRA still match it
VARIANTS = (
    *("rsLoRA", "DoRA", "PiSSA", "LoRA+", "LoRA-GA", "LoRA-Pro", "Muon", "AdaLoRA"),
    *("VeRA", "OFT", "LoRA-RITE", "EVA", "LoKr", "OLoRA"),
)
"""What LoRA is compared with: the methods but for LoRA, full and the head."""
RANKS = "LoRA r = 1", "LoRA r = 64"
KERNELS = "LoRA, MLP", "LoRA, attention"


class Verdict(NamedTuple):
    """A row.

    Attributes:
      claimed: with its source.
      found: the figure and its interval.
      verdict: "shown", "not shown", "contradicted" or "not run".
    """

    claimed: str
    found: str
    verdict: str


class Standing(NamedTuple):
    """What the rows are about.

    Attributes:
      finished: outcomes by arm.
      variants: those of VARIANTS that the task has, finished or not.
      percent: whether scores are percentages, whose differences are points; else a
        difference is told in percent of LoRA's score.
      base: the score before training; None where a fresh head makes it meaningless.
    """

    finished: Finished
    variants: Sequence[str]
    percent: bool
    base: float | None = None


def verdicts(
    finished: Finished, every: Collection[str], percent: bool, base: float | None = None
) -> list[Verdict]:
    """Returns the row of every claim about arms that a task has.

    Args:
      finished: arms of the task.
      every: all its arms.
      percent: as of `Standing`.
      base: as of `Standing`.
    """
    variants = [name for name in VARIANTS if name in every]
    own = Standing(finished, variants, percent, base)
    rules: tuple[tuple[Callable[[Standing], Verdict], bool], ...] = (
        (_gained, base is not None and "full" in every),
        (_alike, bool(variants)),
        (_unbeaten, bool(variants)),
        (_ten_times, "full" in every),
        (_small_rank, {*RANKS} <= set(every)),
        (_mlp_first, {*KERNELS} <= set(every)),
    )
    return [rule(own) for rule, asked in rules if asked]


def interval(
    finished: Finished, one: str, other: str, percent: bool
) -> tuple[float, float]:
    """Returns the mean and half the 95 % interval of one arm minus another."""
    off = finished[one].scores - finished[other].scores
    off = off if percent else 100 * off / finished["LoRA"].scores.mean()
    return float(off.mean()), _half(off)


def _half(values: np.ndarray) -> float:
    """Half the 95 % interval of the mean of `values: [seeds]`."""
    quantile = paired.STUDENT_T.get(len(values), 1.96)
    return quantile * paired.standard_error(values)


def _alike(own: Standing) -> Verdict:
    claimed = "at rates of their own all methods end within 1 to 2 % (2602.04998)"
    found = _variants(own)
    if not found:
        return Verdict(claimed, "-", "not run")
    beyond = [n for n, (mean, half) in found.items() if abs(mean) - half > NEAR]
    within = [n for n, (mean, half) in found.items() if abs(mean) + half <= NEAR]
    means = [mean for mean, _ in found.values()]
    told = (
        f"minus LoRA {min(means):+.2f} to {max(means):+.2f}; of {len(found)} intervals "
        f"{len(within)} lie within {NEAR:g}, {_counted(beyond)} beyond"
    )
    shown = len(within) == len(own.variants)
    return Verdict(claimed, told, _verdict(shown, bool(beyond)))


def _unbeaten(own: Standing) -> Verdict:
    claimed = "LoRA at its own rate matches or surpasses most variants (2601.22708)"
    found = _variants(own)
    if not found:
        return Verdict(claimed, "-", "not run")
    better = [name for name, (mean, half) in found.items() if mean + half < 0]
    worse = [name for name, (mean, half) in found.items() if mean - half > 0]
    held = [name for name, (mean, half) in found.items() if mean - half >= -MATCHED]
    told = (
        f"of {len(found)} {_counted(worse)} are worse and {_counted(better)} better; "
        f"{len(held)} are not better by {MATCHED:g}, by their intervals"
    )
    most = len(own.variants) / 2
    return Verdict(claimed, told, _verdict(len(held) > most, len(better) > most))


def _ten_times(own: Standing) -> Verdict:
    claimed = "LoRA's best rate is about 10 times full's (LoRA Without Regret)"
    if not {"full", "LoRA"} <= own.finished.keys():
        return Verdict(claimed, "-", "not run")
    ratio = own.finished["LoRA"].rate / own.finished["full"].rate
    told = f"{ratio:.2g} times; rates are half a decade apart"
    near = abs(np.log10(ratio) - 1) <= 0.51  # a neighbour on the grid
    return Verdict(claimed, told, _verdict(near, not near))


def _gained(own: Standing) -> Verdict:
    claimed = f"LoRA r = 8 keeps {KEPT:.0%} of full fine-tuning's gain, or more"
    if own.base is None or not {"LoRA", "full"} <= set(own.finished):
        return Verdict(claimed, "-", "not run")
    lora, full = (own.base - own.finished[name].scores for name in ("LoRA", "full"))
    share = lora / full
    mean, half = float(share.mean()), _half(share)
    verdict = _verdict(mean - half >= KEPT, mean + half < KEPT)
    return Verdict(claimed, f"{mean:.1%} +- {half:.1%}", verdict)


def _small_rank(own: Standing) -> Verdict:
    claimed = "a rank of 1 does about as well as 64 (2106.09685, table 6)"
    return _pair(own, claimed, pair=RANKS, span=(-NEAR, NEAR))


def _mlp_first(own: Standing) -> Verdict:
    claimed = "of as many parameters the MLP's kernels are worth more than attention's"
    claimed += " (LoRA Without Regret)"
    return _pair(own, claimed, pair=KERNELS, span=(-np.inf, 0.0))


def _pair(
    own: Standing, claimed: str, *, pair: tuple[str, str], span: tuple[float, float]
) -> Verdict:
    """The first arm minus the second, which is claimed to lie in a span."""
    if not {*pair, "LoRA"} <= set(own.finished):
        return Verdict(claimed, "-", "not run")
    mean, half = interval(own.finished, *pair, own.percent)
    inside = span[0] <= mean - half and mean + half <= span[1]
    outside = mean - half > span[1] or mean + half < span[0]
    told = f"{' minus '.join(pair)}: {mean:+.2f} +- {half:.2f}"
    return Verdict(claimed, told, _verdict(inside, outside))


def _verdict(shown: bool, contradicted: bool) -> str:
    return "shown" if shown else "contradicted" if contradicted else "not shown"


def _counted(names: Sequence[str]) -> str:
    """How many, and which."""
    return f"{len(names)} ({', '.join(names)})" if names else "none"


def _variants(own: Standing) -> dict[str, tuple[float, float]]:
    """Of every variant that is finished, the interval to LoRA."""
    if "LoRA" not in own.finished:
        return {}
    return {
        name: interval(own.finished, name, "LoRA", own.percent)
        for name in own.variants
        if name in own.finished
    }
