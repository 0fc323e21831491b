"""Gaussian init with a width-independent scale, and a choice of which factor is zero.

    zero="b":   a ~ N(0, 1/in),   b = 0
    zero="a":   a = 0,            b ~ N(0, 1/rank)

so that the entries of `x @ a`, or of `h @ b`, are as large as those of their input.
This is not PEFT's "gaussian", whose a has standard deviation 1/rank at any width.

References:
  Hayou et al., The Impact of Initialization on LoRA Finetuning Dynamics,
  arXiv:2406.08447.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from lorax import _checks
from lorax.adapters import making
from lorax.inits import build
from lorax.kernels import Kernel
from lorax.targets import Target

OPTIONS = {"zero": None}


def gaussian(
    key: jax.Array, kernel: Kernel, target: Target, stats: Any = None
) -> tuple[Any, Kernel]:
    """Returns an adapter whose update is zero, and the kernel unchanged.

    Args:
      key: the key for this path.
      kernel: the leaf and its axes.
      target: its option `zero` is "a" or "b"; None (the default) means "b", or "a" for
        an embedding lookup.
      stats: not used.

    Raises:
      ValueError: an unknown `zero`.
    """
    del stats
    zero = making.options(target, OPTIONS)["zero"]
    if zero is None:
        zero = "a" if kernel.op == "gather" else "b"
    _checks.one_of("zero", zero, ("a", "b"), where=kernel.path)
    in_, out, batch = making.sizes(kernel, target)
    a = jnp.zeros((*batch, *in_, target.rank), target.dtype)
    b = jnp.zeros((*batch, target.rank, *out), target.dtype)
    if zero == "b":
        draw = jax.random.normal(key, a.shape, target.dtype)
        a = draw / math.sqrt(math.prod(in_))
    else:
        b = jax.random.normal(key, b.shape, target.dtype) / math.sqrt(target.rank)
    return build.around_factors(kernel, target, a, b), kernel
