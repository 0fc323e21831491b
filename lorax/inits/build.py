"""From factors to an adapter, and what a moved part leaves of the kernel.

An init chooses a, b, and how much of the kernel they carry; the parametrisation and the
target's static fields are put around them by the class, and the frozen leaf is reduced
by what the *cast* factors represent, in float32, before its one rounding.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from lorax import adapters
from lorax.adapters import layout, making
from lorax.kernels import Kernel
from lorax.targets import Target
from lorax.types import GradSketch


def around_factors(kernel: Kernel, target: Target, a: jax.Array, b: jax.Array) -> Any:
    """Returns the target's class around factors of the whole stack.

    Args:
      kernel: the leaf before any part of it moves: DoRA's magnitude is its norm.
      target: of a class that has `from_factors`.
      a: `[*batch, *in, rank]`, its in axes flattened or not; cast to target.dtype.
      b: `[*batch, rank, *out]`, likewise.
    """
    cls: Any = adapters.of_target(target)
    return cls.from_factors(kernel, target, a, b)


def around_triplets(
    kernel: Kernel, target: Target, u: jax.Array, s: jax.Array, vt: jax.Array
) -> Any:
    """Returns the target's class with the product `u diag(s) vt` of the whole stack.

    Args:
      kernel: the leaf before any part of it moves.
      target: of a class that has `from_triplets`.
      u: `[*batch, in, rank]`, in axes flattened.
      s: `[*batch, rank]`, not negative.
      vt: `[*batch, rank, out]`, likewise.
    """
    cls: Any = adapters.of_target(target)
    return cls.from_triplets(kernel, target, u, s, vt)


def moved(kernel: Kernel, adapter: Any, by: str, **given: Any) -> tuple[Any, Kernel]:
    """Returns the adapter, and the kernel less its product: merging gives it back.

    A gain is one at the start, where the norm is the kernel's own.

    Args:
      kernel: the leaf before any part of it moves.
      adapter: whose product is taken out of the kernel.
      by: name of the init, for the adapter's record.
      given: what the part depends on besides kernel, data and key, for the record.
    """
    said = ", ".join(f"{name}={value}" for name, value in given.items())
    adapter = dataclasses.replace(adapter, moved_by=f"{by}({said})")
    value = jnp.asarray(kernel.value)
    a, b, *_ = adapter.factors(value)
    delta = layout.product(a, b, adapter.axes, value)
    rest = (value.astype(delta.dtype) - delta).astype(value.dtype)
    return adapter, dataclasses.replace(kernel, value=rest)


def flat_triplets(
    kernel: Kernel, target: Target, stats: GradSketch
) -> tuple[jax.Array, jax.Array]:
    """Returns u `[*batch, in, k]` and vt `[*batch, k, out]` of a gradient sketch."""
    in_, out, batch = making.sizes(kernel, target)
    k = stats.s.shape[-1]
    want = (*batch, *in_, k), (*batch, k, *out)
    if (stats.u.shape, stats.vt.shape) != want:
        raise ValueError(
            f"{kernel.path}: the statistics have shapes {stats.u.shape} and "
            f"{stats.vt.shape}, and this target needs {want[0]} and {want[1]}; "
            "calibrate with the targets that go to lorax.init"
        )
    u = stats.u.reshape(*batch, math.prod(in_), k)
    return u, stats.vt.reshape(*batch, k, math.prod(out))


def require_shape(kernel: Kernel, found: jax.Array, want: tuple[int, ...]) -> None:
    """Raises ValueError for statistics that were made for another target."""
    if found.shape != want:
        raise ValueError(
            f"{kernel.path}: the statistics have the shape {found.shape}, and this "
            f"target needs {want}; calibrate with the targets that go to lorax.init"
        )
