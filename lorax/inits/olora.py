"""OLoRA: an orthonormal init from the QR decomposition of the kernel.

    W0^T = Q R,    b = Q_r^T,    a = R_r^T,    W0 <- W0 - s a b

The first r columns of Q are an orthonormal basis on the output side, as in the paper
and in PEFT, which also subtracts with the scale s. Making R's diagonal positive fixes
the signs.

References:
  Büyükakyüz, OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models,
  arXiv:2406.01775.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lorax import _lapack
from lorax.adapters import making
from lorax.inits import build
from lorax.kernels import Kernel
from lorax.targets import Target


def olora(
    key: jax.Array, kernel: Kernel, target: Target, stats: Any = None
) -> tuple[Any, Kernel]:
    """Returns the leading part of the decomposition, and the kernel without it.

    Args:
      key: not used.
      kernel: the leaf and its axes.
      target: gives the rank and static fields; no options.
      stats: not used.
    """
    del key, stats
    q, r = _lapack.qr(making.matrices(kernel, target).mT)
    diagonal = jnp.diagonal(r, axis1=-2, axis2=-1)
    sign = jnp.where(diagonal < 0, -1.0, 1.0).astype(r.dtype)[..., : target.rank]
    a = r[..., : target.rank, :].mT * sign[..., None, :]
    b = (q[..., : target.rank] * sign[..., None, :]).mT
    adapter = build.around_factors(kernel, target, a, b)
    return build.moved(kernel, adapter, "olora", rank=target.rank, scale=target.scale)
