"""PiSSA: the adapter starts as the principal part of the kernel, which keeps the rest.

    W0 = U S V^T,    a = U_r sqrt(S_r / s),    b = sqrt(S_r / s) V_r^T,
    W0 <- W0 - s a b

For AdaLoRA p = U_r, lam = S_r / s, q = V_r^T. The division by the scale s is PEFT's;
the paper's recipes have alpha = rank, so s = 1. The update of the *cast* factors is
subtracted, so neither their rounding nor an inexact decomposition changes the initial
function.

References:
  Meng et al., PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large
  Language Models, arXiv:2404.02948.
"""

from __future__ import annotations

from typing import Any

import jax

from lorax import linalg
from lorax.adapters import making
from lorax.inits import build
from lorax.kernels import Kernel
from lorax.targets import Target

OPTIONS = {"iterations": None}


def pissa(
    key: jax.Array, kernel: Kernel, target: Target, stats: Any = None
) -> tuple[Any, Kernel]:
    """Returns the principal part as an adapter, and the kernel without it.

    Args:
      key: the key for this path, used by the randomised decomposition.
      kernel: the leaf and its axes.
      target: its option `iterations` is None for an exact decomposition (the default),
        or the number of power iterations of a randomised one: 4 in the paper's fast
        variant, 16 in its scripts.
      stats: not used.
    """
    del stats
    iterations = making.options(target, OPTIONS)["iterations"]
    matrix = making.matrices(kernel, target)
    if iterations is None:
        u, s, vt = linalg.svd(matrix, target.rank)
    else:
        u, s, vt = linalg.randomized_svd(
            key, matrix, target.rank, iterations=iterations
        )
    s = s / target.scale
    adapter = build.around_triplets(kernel, target, u, s, vt)
    drawn = {} if iterations is None else {"iterations": iterations}
    return build.moved(kernel, adapter, "pissa", rank=target.rank, **drawn)
