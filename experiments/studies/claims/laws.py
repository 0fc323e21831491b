"""The laws for batch sizes as claims: by how much the best rate should change."""

import math
from typing import Final, Literal

import numpy as np

from experiments.studies.method import scorecard
from lorax import scaling

LAWS: tuple[scaling.BatchRule, ...] = ("sqrt", "surge", "mean_field")
PER_PARAMETER: Final = "per parameter"
Law = scaling.BatchRule | Literal["per parameter"]
PAPERS: dict[Law, str] = {
    "sqrt": "2405.14578",
    "surge": "2405.14578",
    "mean_field": "https://kexue.fm/archives/10542",
    PER_PARAMETER: "https://kexue.fm/archives/10563",
}
NEAR = 0.5
"""Octaves that a prediction may be off."""


def octaves(
    law: scaling.BatchRule, batch: int, new_batch: int, noise_scale: float
) -> float:
    """log2 of the factor by which a law changes the rate."""
    rate = scaling.learning_rate_for_batch(
        1.0, batch, new_batch, law, noise_scale=noise_scale
    )
    return math.log2(rate)


def claim(
    law: Law, predicted: float, found: np.ndarray, told: str, where: str
) -> scorecard.Claim:
    """That the best rate changes as a law says.

    Args:
      law: its name.
      predicted: log2 of the factor.
      found: the same, measured, `[values]`.
      told: from where to where.
      where: it was measured.
    """
    return scorecard.Claim(
        f"The best rate follows the law {law!r}",
        PAPERS[law],
        f"octaves {told}, minus the law's {predicted:+.2f}; {where}",
        found - predicted,
        low=-NEAR,
        high=NEAR,
    )
