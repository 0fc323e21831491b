"""Orthogonal init: neither factor is zero, but their product is.

    Q orthogonal, [rank, rank],    X, [in, rank/2], and Y, [rank/2, out], ~ N(0, 1)
    a = std X Q[0::2],    b = std Q[1::2]^T Y

so that a b = std^2 X (Q[0::2] Q[1::2]^T) Y = 0, up to rounding, since the rows of Q are
orthogonal. As in PEFT's `init_lora_weights="orthogonal"`, each factor has half the
rank, and the two span complementary halves of the bottleneck. The kernel is unchanged.

References:
  Datta, Rethinking LoRA initialisation, datta0.github.io/posts/rethink-lora-init;
  PEFT, `tuners/lora/layer.py`.
"""

from __future__ import annotations

import math
from typing import Any

import jax

from lorax import _lapack, linalg
from lorax.adapters import making
from lorax.inits import build
from lorax.kernels import Kernel
from lorax.targets import Target

OPTIONS = {"std": 0.1}


def orthogonal(
    key: jax.Array, kernel: Kernel, target: Target, stats: Any = None
) -> tuple[Any, Kernel]:
    """Returns an adapter whose factors cancel, and the kernel unchanged.

    Args:
      key: the key for this path.
      kernel: the leaf and its axes.
      target: its option `std` multiplies both factors, 0.1 as in PEFT; entries of a and
        b then have standard deviation `std / sqrt(2)`.
      stats: not used.

    Raises:
      ValueError: an odd rank.
    """
    del stats
    std, rank = making.options(target, OPTIONS)["std"], target.rank
    if rank % 2:
        raise ValueError(
            f"{kernel.path}: init='orthogonal' halves the rank, but rank={rank}; give "
            "an even rank"
        )
    in_, out, batch = making.sizes(kernel, target)
    square, left, right = jax.random.split(key, 3)

    def normal(key: jax.Array, *shape: int) -> jax.Array:
        return jax.random.normal(key, (*batch, *shape))

    q = _lapack.qr(normal(square, rank, rank))[0]
    x = normal(left, math.prod(in_), rank // 2)
    y = normal(right, rank // 2, math.prod(out))
    a = std * linalg.dot(x, q[..., 0::2, :])
    b = std * linalg.dot(q[..., 1::2, :].mT, y)
    return build.around_factors(kernel, target, a, b), kernel
