"""LoRA-SB: LoRA-XS between the gradient's singular vectors, with a first step as core.

    -G = U S V^T,    a = U_r,    R = g diag(S_r / S_1) / scale,    b = V_r^T

With orthonormal a and b, the gradient of R is the projection of the full gradient, so
every step of R is the best one in their span. The init is itself a first step of full
fine-tuning: `merge` at init does *not* give the original kernel, but one that has moved
by g along the best rank-r part of -G. The paper takes its optimiser's first step, for
AdamW `-lr sign(G)`; a sketch of G does not have the signs of its entries, so here g
gives the size of the step.

References:
  Ponkshe et al., Initialization using Update Approximation is a Silver Bullet for
  Extremely Efficient Low-Rank Fine-Tuning, arXiv:2411.19557;
  github.com/RaghavSinghal10/lora-sb.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lorax import _checks, adapters
from lorax.adapters import making
from lorax.inits import build
from lorax.kernels import Kernel
from lorax.targets import Target
from lorax.types import GradSketch

OPTIONS = {"step": 1 / 128}


def lora_sb(
    key: jax.Array, kernel: Kernel, target: Target, stats: GradSketch
) -> tuple[Any, Kernel]:
    """Returns a first step between the gradient's directions; the kernel unchanged.

    Args:
      key: not used.
      kernel: the leaf and its axes.
      target: its option `step` is g, the largest singular value of the move: 1/128 as
        in LoRA-One; 0 starts at the kernel, with the same directions.
      stats: this path's statistics from `lorax.calibrate`.

    Raises:
      ValueError: a `step` that is negative or not a finite number.
    """
    del key
    g, rank = making.options(target, OPTIONS)["step"], target.rank
    if not _checks.is_finite(g) or g < 0:
        raise ValueError(
            f"{kernel.path}: step={g!r}; give a number >= 0, such as 1/128"
        )
    u, vt = build.flat_triplets(kernel, target, stats)
    s, first = stats.s[..., :rank], stats.s[..., :1]
    sizes = g / target.scale * s / jnp.where(first > 0, first, 1)
    core = sizes[..., None] * jnp.eye(rank, dtype=s.dtype)
    bases = -u[..., :rank], core, vt[..., :rank, :]
    cls: Any = adapters.of_target(target)
    return cls.from_bases(kernel, target, *bases), kernel
