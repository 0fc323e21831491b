"""A deterministic init: a, the factor that reads, starts as a cosine transform.

    a_{ik} = sqrt(2 / in) cos(pi (i + 1/2) (k + 1) / in),    b = 0

Its columns are orthonormal (DCT-II, without the constant).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from lorax import inits
from lorax.adapters import making
from lorax.inits import build


@inits.register("cosines", keeps_base=True)
def cosines(key: jax.Array, kernel: Any, target: Any, stats: Any = None) -> Any:
    """Returns the adapter, and the kernel unchanged."""
    del key, stats
    in_, out, batch = making.sizes(kernel, target)
    size = math.prod(in_)
    if target.rank >= size:
        raise ValueError(
            f"{kernel.path}: init='cosines' has {size - 1} columns for {size} inputs; "
            f"give a rank below {size}"
        )
    i, k = jnp.arange(size)[:, None], jnp.arange(target.rank)[None]
    a = jnp.sqrt(2 / size) * jnp.cos(jnp.pi * (i + 0.5) * (k + 1) / size)
    a = jnp.broadcast_to(a, (*batch, size, target.rank))
    b = jnp.zeros((*batch, target.rank, math.prod(out)))
    return build.around_factors(kernel, target, a, b), kernel
