"""Makes adapters from factors, and subtracts moved parts from the kernel.

An init chooses a, b, and how much of the kernel they carry. The adapter class adds the
target's static fields, and the product of the *cast* factors is subtracted from the
frozen leaf in at least float32, before a single rounding.
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
    """Returns the target's adapter, made from factors of the whole stack.

    Args:
      kernel: the leaf before any part of it moves; DoRA's magnitude is its norm.
      target: a target whose class has `from_factors`.
      a: `[*batch, *in, rank]`, in axes flattened or not; cast to target.dtype.
      b: `[*batch, rank, *out]`, out axes flattened or not; cast to target.dtype.
    """
    cls: Any = adapters.of_target(target)
    return cls.from_factors(kernel, target, a, b)


def around_triplets(
    kernel: Kernel, target: Target, u: jax.Array, s: jax.Array, vt: jax.Array
) -> Any:
    """Returns the target's adapter with the product `u diag(s) vt`.

    Args:
      kernel: the leaf before any part of it moves.
      target: a target whose class has `from_triplets`.
      u: `[*batch, in, rank]`, in axes flattened.
      s: `[*batch, rank]`, not negative.
      vt: `[*batch, rank, out]`, out axes flattened.
    """
    cls: Any = adapters.of_target(target)
    return cls.from_triplets(kernel, target, u, s, vt)


def moved(kernel: Kernel, adapter: Any, by: str, **given: Any) -> tuple[Any, Kernel]:
    """Returns the adapter, and the kernel minus its product, which merging restores.

    A gain can be ignored: it is one at init, where the norm is the kernel's own.

    Args:
      kernel: the leaf before any part of it moves.
      adapter: the adapter whose product is subtracted.
      by: name of the init, recorded in the adapter.
      given: what the part depends on besides kernel, data and key, also recorded.
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
    """Returns a gradient sketch's u `[*batch, in, k]` and vt `[*batch, k, out]`."""
    in_, out, batch = making.sizes(kernel, target)
    k = stats.s.shape[-1]
    want = (*batch, *in_, k), (*batch, k, *out)
    if (stats.u.shape, stats.vt.shape) != want:
        raise ValueError(
            f"{kernel.path}: the statistics have shapes {stats.u.shape} and "
            f"{stats.vt.shape}, but this target needs {want[0]} and {want[1]}; "
            "calibrate with the targets that you pass to lorax.init"
        )
    u = stats.u.reshape(*batch, math.prod(in_), k)
    return u, stats.vt.reshape(*batch, k, math.prod(out))


def require_shape(kernel: Kernel, found: jax.Array, want: tuple[int, ...]) -> None:
    """Raises ValueError for statistics that were made for another target."""
    if found.shape != want:
        raise ValueError(
            f"{kernel.path}: the statistics have shape {found.shape}, but this target "
            f"needs {want}; calibrate with the targets that you pass to lorax.init"
        )
