"""From factors to an adapter: what every initialisation ends with.

An init chooses a, b, and how much of the kernel they carry; the parametrisation and the
target's static fields are put around them here, and the frozen leaf is reduced by what
the *cast* factors represent, in float32, before its one rounding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from lorax import _explicit
from lorax.adapters import AdaLora, Dora, Lora, layout
from lorax.adapters.dora import column_norm
from lorax.kernels import Kernel
from lorax.targets import Target
from lorax.types import Adapter, GradSketch

Made = TypeVar("Made", bound=Lora | Dora | AdaLora)


def lora_or_dora(
    kernel: Kernel, target: Target, a: jax.Array, b: jax.Array
) -> Lora | Dora:
    """Returns the adapter around factors of the whole stack, or of its chosen layers.

    Args:
      kernel: the leaf before any part of it moves: DoRA's magnitude is its norm.
      target: "lora" or "dora", with its static fields.
      a: `[*batch, *in, rank]`, its in axes flattened or not; cast to target.dtype.
      b: `[*batch, rank, *out]`, likewise.
    """
    a, b = unflatten(kernel, target, a, b)
    a, b = a.astype(target.dtype), b.astype(target.dtype)
    axes = kernel.linear_axes()
    static = (target.scale, axes, target.dropout, target.layers)
    if target.adapter == "lora":
        return Lora(a, b, *static)
    magnitude = column_norm(chosen_layers(kernel, target), None, None, axes)
    detach = dict(target.options).get("detach_norm", True)
    return Dora(a, b, magnitude, *static, detach_norm=detach)


def adalora(
    kernel: Kernel, target: Target, p: jax.Array, lam: jax.Array, q: jax.Array
) -> AdaLora:
    """Returns the adapter around triplets of the flattened kernel."""
    p, q = unflatten(kernel, target, p, q)
    p, lam, q = (x.astype(target.dtype) for x in (p, lam, q))
    axes = kernel.linear_axes()
    return AdaLora(p, lam, q, target.scale, axes, target.dropout, target.layers)


def moved(kernel: Kernel, adapter: Made, by: str, **given: Any) -> tuple[Made, Kernel]:
    """Returns the adapter, and the kernel less its update: merging gives it back.

    Args:
      kernel: the leaf before any part of it moves.
      adapter: whose update is taken out of the kernel.
      by: name of the init, for the adapter's record.
      given: what the part depends on besides kernel, data and key, for the record.
    """
    said = ", ".join(f"{name}={value}" for name, value in given.items())
    adapter = dataclasses.replace(adapter, moved_by=f"{by}({said})")
    value = jnp.asarray(kernel.value)
    plain: Adapter = adapter
    if isinstance(adapter, Dora):  # its gain is one where the norm is the kernel's own
        plain = Lora(
            adapter.a, adapter.b, adapter.scale, adapter.axes, 0.0, adapter.layers
        )
    delta = plain.delta(value)
    rest = (value.astype(delta.dtype) - delta).astype(value.dtype)
    return adapter, dataclasses.replace(kernel, value=rest)


def sizes(kernel: Kernel, target: Target) -> tuple[tuple[int, ...], ...]:
    """Returns the (in, out, batch) sizes of what gets factors."""
    in_, out, batch = kernel.linear_axes().sizes(kernel.shape)
    if target.layers is not None:
        batch = (len(target.layers), *batch[1:])
    return in_, out, batch


def chosen_layers(kernel: Kernel, target: Target) -> jax.Array:
    """Returns the leaf, or of a stack the layers that get factors."""
    value = jnp.asarray(kernel.value)
    if target.layers is None:
        return value
    return layout.chosen(value, target.layers, kernel.linear_axes().batch[0])


def matrices(kernel: Kernel, target: Target) -> jax.Array:
    """Returns the chosen layers as `[*batch, in, out]` in float32, axes flattened."""
    value = chosen_layers(kernel, target)
    in_, out, batch = sizes(kernel, target)
    value = value.astype(layout.wide(value)).transpose(kernel.linear_axes().order)
    shape = (*batch, math.prod(in_), math.prod(out))
    lies = [*_explicit.entries(value)[: len(batch)], None, None]
    return _explicit.reshape(value, shape, lies)


def unflatten(
    kernel: Kernel, target: Target, a: jax.Array, b: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gives factors `[*batch, in, r]` and `[*batch, r, out]` the leaf's own axes."""
    in_, out, batch = sizes(kernel, target)
    rank = a.shape[-1]
    return a.reshape(*batch, *in_, rank), b.reshape(*batch, rank, *out)


def flat_triplets(
    kernel: Kernel, target: Target, stats: GradSketch
) -> tuple[jax.Array, jax.Array]:
    """Returns u `[*batch, in, k]` and vt `[*batch, k, out]` of a gradient sketch."""
    in_, out, batch = sizes(kernel, target)
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


def options(target: Target, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an init's hyperparameters: its defaults under the target's options."""
    given = dict(target.options)
    return {name: given.get(name, default) for name, default in defaults.items()}
