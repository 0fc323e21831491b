"""Paired comparisons: differences seed by seed, ratios round by round."""

import math
import statistics
from collections.abc import Sequence

import numpy as np

STUDENT_T = {
    **{2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571},
    **{8: 2.365, 10: 2.262, 12: 2.201},
}
"""The two-sided 95 % quantile for n paired differences, by n."""


def standard_error(values: np.ndarray) -> float:
    """Returns the standard error of the mean of `values: [seeds]`."""
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def interval(values: np.ndarray) -> tuple[float, float]:
    """Returns the mean of `values: [seeds]` and half its 95 % interval."""
    half = STUDENT_T.get(len(values), 1.96) * standard_error(values)
    return float(values.mean()), half


def difference(off: np.ndarray, digits: int = 4) -> str:
    """Returns a paired difference with its 95 % interval, and says if it covers 0.

    If a run diverged there is no difference to report: the text is "not finite".

    Args:
      off: `[seeds]`, one value minus the other, seed by seed.
      digits: decimal places.
    """
    if not np.isfinite(off).all():
        return "not finite"
    mean, half = interval(off)
    told = f"{mean:+.{digits}f} +- {half:.{digits}f}"
    return told + ("" if abs(mean) > half else ": no difference shown")


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Returns the median over rounds of `numerator / denominator`."""
    return statistics.median(ratios(numerator, denominator))


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Returns `numerator / denominator`, round by round."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]
