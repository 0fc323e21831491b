"""The published initialisations at which the update is zero.

LoRA and DoRA:

    a ~ U(-1/sqrt(in), 1/sqrt(in)),    b = 0

which is what `kaiming_uniform(a=sqrt(5))` of the reference implementation amounts to.
Embeddings are mirrored, a = 0 and b ~ N(0, 1), as there and in PEFT. AdaLoRA:

    p, q ~ N(0, 0.02^2),    lam = 0

References:
  Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685;
  github.com/microsoft/LoRA. Zhang et al., AdaLoRA, arXiv:2303.10512.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from lorax.adapters import AdaLora, Dora, Lora, SlicedLora
from lorax.inits import build
from lorax.kernels import Kernel
from lorax.targets import Target

ADALORA_STD = 0.02  # of p and q, as in github.com/QingruZhang/AdaLoRA


def standard(
    key: jax.Array, kernel: Kernel, target: Target, stats: Any = None
) -> tuple[Lora | SlicedLora | Dora | AdaLora, Kernel]:
    """Returns an adapter whose update is zero, and the kernel unchanged.

    Args:
      key: of this path.
      kernel: the leaf and its axes.
      target: parametrisation, rank, scale, dropout, dtype, layers. No options.
      stats: not used.

    Returns:
      The adapter, its factors `[*batch, *in, rank]` and `[*batch, rank, *out]`; the
      kernel.
    """
    del stats
    in_, out, batch = build.sizes(kernel, target)
    a_shape = (*batch, *in_, target.rank)
    b_shape = (*batch, target.rank, *out)
    if target.adapter == "adalora":
        left, right = jax.random.split(key)
        normal = lambda key, shape: (
            ADALORA_STD * jax.random.normal(key, shape, target.dtype)
        )
        return AdaLora(
            normal(left, a_shape),
            jnp.zeros((*batch, target.rank), target.dtype),
            normal(right, b_shape),
            target.scale,
            kernel.linear_axes(),
            target.dropout,
            target.layers,
        ), kernel
    if kernel.op == "gather":
        a = jnp.zeros(a_shape, target.dtype)
        b = jax.random.normal(key, b_shape, target.dtype)
    elif target.slices is not None:
        parts = len(target.slices)
        bound = 1 / math.sqrt(math.prod(in_))
        shape = (*batch, parts, *in_, target.rank)
        return SlicedLora(
            jax.random.uniform(key, shape, target.dtype, -bound, bound),
            jnp.zeros((*batch, parts, target.rank, *out[1:]), target.dtype),
            target.scale,
            kernel.linear_axes(),
            target.slices,
            out[0],
            target.dropout,
            target.layers,
        ), kernel
    else:
        bound = 1 / math.sqrt(math.prod(in_))
        a = jax.random.uniform(key, a_shape, target.dtype, -bound, bound)
        b = jnp.zeros(b_shape, target.dtype)
    return build.lora_or_dora(kernel, target, a, b), kernel
