"""LoRA-GA: an init whose first step is the best low-rank step of full fine-tuning.

    G = U S V^T,    a = c U[:, :r],    b = c V[:, r:2r]^T,    W0 <- W0 - s a b

One step of SGD on a and b then moves W, to first order in the learning rate, by

    -lr (s c)^2 [best rank-2r approximation of G]

which attains the Eckart-Young bound; the signs of the decomposition do not matter. Use
the learning rate of *full fine-tuning*, not LoRA's.

References:
  Wang et al., LoRA-GA: Low-Rank Adaptation with Gradient Approximation,
  arXiv:2407.05000; github.com/Outsider565/LoRA-GA.
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
from lorax.types import GradSketch

OPTIONS = {"scale": "stable", "gamma": 16.0, "norm_clip": False}


def lora_ga(
    key: jax.Array, kernel: Kernel, target: Target, stats: GradSketch
) -> tuple[Any, Kernel]:
    """Returns the gradient's singular directions, and the kernel without their product.

    Args:
      key: not used.
      kernel: the leaf and its axes.
      target: its options are `scale`: "stable" (the default, c = out^(1/4) /
        sqrt(gamma)), "gd" (c = 1/s: the first step is full fine-tuning's own) or "unit"
        (c = 1); `gamma`: 16 as in the authors' library; `norm_clip`: whether to shrink
        both factors if the product would exceed the kernel's largest entry.
      stats: this path's statistics from `lorax.calibrate`.

    Raises:
      ValueError: an unknown `scale`, or 2 rank above min(in, out).
    """
    del key
    options = making.options(target, OPTIONS)
    in_, out, batch = making.sizes(kernel, target)
    n, m, rank = math.prod(in_), math.prod(out), target.rank
    if 2 * rank > min(n, m):
        raise ValueError(
            f"{kernel.path}: init='lora_ga' takes 2 x rank = {2 * rank} directions, "
            f"but the kernel has min(in, out) = {min(n, m)}; lower the rank here, or "
            "give the leaf a target with another init"
        )
    scales = {
        "stable": m**0.25 / math.sqrt(options["gamma"]),
        "gd": 1 / target.scale,
        "unit": 1.0,
    }
    _checks.one_of("scale", options["scale"], tuple(scales), where=kernel.path)
    c = scales[options["scale"]]
    u, vt = build.flat_triplets(kernel, target, stats)
    a, b = c * u[..., :rank], c * vt[..., rank : 2 * rank, :]
    if options["norm_clip"]:
        size = target.scale * _largest(a @ b)
        own = _largest(making.matrices(kernel, target))
        shrink = jnp.sqrt(jnp.minimum(1, own / size))
        a, b = a * shrink, b * shrink
    adapter = build.around_factors(kernel, target, a, b)
    recipe = {"rank": rank, "scale": target.scale, "options": options}
    return build.moved(kernel, adapter, "lora_ga", **recipe)


def _largest(x: jax.Array) -> jax.Array:
    """The largest entry of every matrix."""
    return jnp.max(jnp.abs(x), (-2, -1), keepdims=True)
