"""Learning rates for other widths and ranks of an adapter.

References:
  Hayou et al., LoRA+, arXiv:2402.12354. Kalajdzievski, A Rank Stabilization Scaling
  Factor for Fine-Tuning with LoRA, arXiv:2312.03732.
"""

from __future__ import annotations

import math
from typing import Literal

from lorax import _checks
from lorax._checks import Number

Scaling = Literal["standard", "rank_stabilized"]

LORA_PLUS_RANGE = 1.0, 64.0  # the range in which the width rule is trusted


def lora_plus_ratio(in_: int, out: int, rank: int) -> float:
    """Returns LoRA+'s ratio of the learning rates of b and a, from a kernel's widths.

        clip(n / sqrt(m r), 1, 64)

    It follows from equal contributions of a and b to the loss, under sign-like updates,
    with the stationary scales std a ~ 1 / sqrt(n), std b ~ 1 / sqrt(r) and independent
    gradient entries. For square kernels it is sqrt(n / r), which is 16 at n = 2048 and
    r = 8, the fixed ratio in common use.

    Args:
      in_: n, the product of the sizes of the kernel's in axes.
      out: m, the product of the sizes of its out axes.
      rank: r.

    Raises:
      ValueError: a size that is not positive.

    Example:
      >>> lora_plus_ratio(2048, 2048, 8)
      16.0
      >>> lora_plus_ratio(64, 4096, 16)
      1.0
    """
    _checks.all_positive(in_=in_, out=out, rank=rank)
    low, high = LORA_PLUS_RANGE
    return min(max(in_ / math.sqrt(out * rank), low), high)


def learning_rate_for_rank(
    lr: Number,
    rank: int,
    new_rank: int,
    scaling: Scaling = "standard",
    *,
    optimizer: Literal["adam", "sgd"] = "adam",
) -> Number:
    """Returns the learning rate for a new rank, with alpha and all else held fixed.

    At b = 0 only b moves. With G the kernel's gradient and s the scale, the gradient of
    b is s a^T G, so the first step lowers the loss by

        adam  lr s   sum_kj |(a^T G)_kj|      ~ lr s r
        sgd   lr s^2 sum_kj  (a^T G)_kj ^2    ~ lr s^2 r

    since the r rows of a^T G are of equal size: the columns of a have the same
    distribution at any rank. Holding that constant, with s = alpha / r or
    alpha / sqrt(r):

                standard                rank_stabilized
        adam    lr                      lr sqrt(rank / new_rank)
        sgd     lr new_rank / rank      lr

    The last entry is rsLoRA's own argument. This is valid for the standard init, early
    in training and at ranks well below min(in, out), and assumes that the curvature
    along the step does not depend on the rank.

    Args:
      lr: the learning rate tuned at `rank`.
      rank: the rank at which it was tuned.
      new_rank: the new rank.
      scaling: as in `lorax.Target`.
      optimizer: "adam" for any optimiser with sign-like steps, or "sgd".

    Raises:
      ValueError: an unknown scaling or optimiser, or a number that is not positive.

    Example:
      >>> learning_rate_for_rank(2e-4, 8, 32)
      0.0002
      >>> learning_rate_for_rank(2e-4, 8, 32, "rank_stabilized")
      0.0001
    """
    exponents = {"standard": -1.0, "rank_stabilized": -0.5}  # exponent of r in s
    powers = {"adam": 1, "sgd": 2}  # power of s in the first step
    _checks.one_of("scaling", scaling, tuple(exponents))
    _checks.one_of("optimizer", optimizer, tuple(powers))
    _checks.all_positive(lr=lr, rank=rank, new_rank=new_rank)
    return lr * (rank / new_rank) ** (1 + powers[optimizer] * exponents[scaling])
