"""LoRA-One: starts with a first step down the gradient; the kernel is unchanged.

    -G = U S V^T,    D = sqrt(g S_r / S_1),    a = U_r D,    b = D V_r^T

so `merge` at init does *not* give the original kernel, but one that has moved by
`s g / S_1` along the best rank-r part of -G.

References:
  Zhang et al., LoRA-One: One-Step Full Gradient Could Suffice for Fine-Tuning Large
  Language Models, Provably and Efficiently, arXiv:2502.01235.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lorax.adapters import making
from lorax.inits import build
from lorax.kernels import Kernel
from lorax.targets import Target
from lorax.types import GradSketch

OPTIONS = {"step": 1 / 128}


def lora_one(
    key: jax.Array, kernel: Kernel, target: Target, stats: GradSketch
) -> tuple[Any, Kernel]:
    """Returns a first step as an adapter, and the kernel unchanged.

    Args:
      key: not used.
      kernel: the leaf and its axes.
      target: its option `step` is g; 1/128 as in the paper's algorithm.
      stats: this path's statistics from `lorax.calibrate`.
    """
    del key
    g, rank = making.options(target, OPTIONS)["step"], target.rank
    u, vt = build.flat_triplets(kernel, target, stats)
    s = stats.s[..., :rank]
    first = s[..., :1]
    root = jnp.sqrt(g * s / jnp.where(first > 0, first, 1))
    a = -u[..., :rank] * root[..., None, :]
    b = root[..., :, None] * vt[..., :rank, :]
    return build.around_factors(kernel, target, a, b), kernel
