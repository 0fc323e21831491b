"""MiLoRA: the adapter starts as the minor part of the kernel, which keeps the rest.

    W0 = U S V^T,    a = U_m sqrt(S_m / s),    b = sqrt(S_m / s) V_m^T,
    W0 <- W0 - s a b

with m the last r of the min(in, out) triplets. For AdaLoRA p = U_m, lam = S_m / s,
q = V_m^T. The division by the scale s is the authors'; their runs have alpha = rank, so
s = 1.

A triplet whose singular value is zero to working precision (a kernel of lower rank, or
of zeros) would leave both factors at zero for good, since each one's gradient is
multiplied by the other. There a is the direction itself and b zero, as in LoRA.

References:
  Wang et al., MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM
  Finetuning, arXiv:2406.09044; github.com/sufenlp/MiLoRA.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lorax import linalg
from lorax.adapters import making
from lorax.inits import build
from lorax.kernels import Kernel
from lorax.targets import Target


def milora(
    key: jax.Array, kernel: Kernel, target: Target, stats: Any = None
) -> tuple[Any, Kernel]:
    """Returns the minor part as an adapter, and the kernel without it.

    Args:
      key: not used.
      kernel: the leaf and its axes.
      target: gives the rank and static fields; no options.
      stats: not used.
    """
    del key, stats
    matrix = making.matrices(kernel, target)
    u, s, vt = linalg.svd(matrix, min(matrix.shape[-2:]))
    rank, largest = target.rank, s[..., :1]
    u, s, vt = u[..., -rank:], s[..., -rank:], vt[..., -rank:, :]
    s = jnp.where(linalg.negligible(s, largest), 0, s / target.scale)
    adapter = build.around_triplets(kernel, target, u, s, vt)
    return build.moved(kernel, adapter, "milora", rank=rank)
