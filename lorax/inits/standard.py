"""The published LoRA initialisation: a random, b zero, the update zero.

    a ~ U(-1/sqrt(in), 1/sqrt(in)),    b = 0

which is what `kaiming_uniform(a=sqrt(5))` of the reference implementation amounts to.
Embeddings are mirrored, a = 0 and b ~ N(0, 1), as there and in PEFT.

References:
  Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685;
  github.com/microsoft/LoRA.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from lorax.adapters import Lora
from lorax.kernels import Kernel
from lorax.targets import Target


def standard(
    key: jax.Array, kernel: Kernel, target: Target, stats: Any = None
) -> tuple[Lora, Kernel]:
    """Returns a LoRA adapter whose update is zero, and the kernel unchanged.

    Args:
      key: of this path.
      kernel: the leaf and its axes.
      target: rank, scale, dropout, dtype, layers.
      stats: not used.

    Returns:
      `Lora` with `a: [*batch, *in, rank]`, `b: [*batch, rank, *out]`; the kernel.
    """
    del stats
    axes = kernel.linear_axes()
    in_, out, batch = axes.sizes(kernel.shape)
    if target.layers is not None:
        batch = (len(target.layers), *batch[1:])
    a_shape = (*batch, *in_, target.rank)
    b_shape = (*batch, target.rank, *out)
    if kernel.op == "gather":
        a = jnp.zeros(a_shape, target.dtype)
        b = jax.random.normal(key, b_shape, target.dtype)
    else:
        bound = 1 / math.sqrt(math.prod(in_))
        a = jax.random.uniform(key, a_shape, target.dtype, -bound, bound)
        b = jnp.zeros(b_shape, target.dtype)
    lora = Lora(a, b, target.scale, axes, target.dropout, target.layers)
    return lora, kernel
