"""Each parametrisation's own init, at which the update is zero.

LoRA's a is random and its b zero, AdaLoRA's lam is zero, and so on; see the `make` of
each class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from lorax import adapters
from lorax.kernels import Kernel
from lorax.targets import Target


def standard(
    key: jax.Array,
    kernel: Kernel,
    target: Target,
    stats: Any = None,
    shared: Mapping[str, jax.Array] | None = None,
) -> tuple[Any, Kernel]:
    """Returns an adapter whose update is zero, and the kernel unchanged.

    Args:
      key: the key for this path.
      kernel: the leaf and its axes.
      target: parametrisation, rank, scale, dropout, dtype, layers.
      stats: not used.
      shared: the frozen arrays that adapters of the class share.
    """
    del stats
    made = adapters.of_target(target).make(key, kernel, target, shared or {})
    return made, kernel
