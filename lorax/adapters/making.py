"""Helpers to make an adapter for a kernel: sizes, matrices, and static fields.

An init chooses the values of the arrays; their shapes and the static fields follow from
the kernel's axes and the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lorax import _explicit
from lorax.adapters import layout
from lorax.quantized import chosen, is_quantized, map_kernels
from lorax.types import Axes, KernelSpec, TargetSpec


def sizes(kernel: KernelSpec, target: TargetSpec) -> tuple[tuple[int, ...], ...]:
    """Returns the (in, out, batch) sizes of what gets factors."""
    in_, out, batch = kernel.linear_axes().sizes(kernel.shape)
    if target.layers is not None:
        batch = (len(target.layers), *batch[1:])
    return in_, out, batch


def statics(kernel: KernelSpec, target: TargetSpec) -> dict[str, Any]:
    """Returns the static fields that most classes have, by name."""
    return {
        "scale": target.scale,
        "axes": kernel.linear_axes(),
        "dropout": target.dropout,
        "layers": target.layers,
    }


def chosen_layers(kernel: KernelSpec, target: TargetSpec) -> jax.Array:
    """Returns the leaf, or the layers of a stack that get factors."""
    if isinstance(kernel.value, jax.ShapeDtypeStruct):
        raise ValueError(
            f"{kernel.path}: adapter={target.adapter!r} or its init reads the kernel's "
            "values, which the program computes only when it runs; use "
            "adapter='lora', init='standard'"
        )
    value = jnp.asarray(kernel.value)
    if target.layers is None:
        return value
    return layout.chosen(value, target.layers, kernel.linear_axes().batch[0])


def read(
    kernel: KernelSpec, target: TargetSpec, run: Callable[[jax.Array, Axes], jax.Array]
) -> jax.Array:
    """Returns `run(kernel, axes)` for the layers that get factors.

    For a quantised leaf, it runs on one kernel at a time, so that only one is dense.
    """
    leaf, axes = kernel.value, kernel.linear_axes()
    if not is_quantized(leaf) or leaf.axes != axes:
        return run(chosen_layers(kernel, target), axes)
    return map_kernels(run, chosen(leaf, target.layers) if target.layers else leaf)


def matrices(kernel: KernelSpec, target: TargetSpec) -> jax.Array:
    """Returns the chosen layers as `[*batch, in, out]`, see `layout.matrices`.

    On an Explicit mesh, every matrix is gathered.
    """
    value, axes = chosen_layers(kernel, target), kernel.linear_axes()
    lies = _explicit.entries(value)
    whole = [lies[axis] if axis in axes.batch else None for axis in range(value.ndim)]
    return layout.matrices(_explicit.moved(value, whole, value), axes)


def unflatten(
    kernel: KernelSpec, target: TargetSpec, a: jax.Array, b: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Unflattens `[*batch, in, r]` and `[*batch, r, out]` to the leaf's axes."""
    in_, out, batch = sizes(kernel, target)
    rank = a.shape[-1]
    return a.reshape(*batch, *in_, rank), b.reshape(*batch, rank, *out)


class Widest(NamedTuple):
    """The sizes needed for frozen arrays that all kernels of one rank share.

    Attributes:
      rank: the rank of the kernels' adapters.
      in_: the largest number of inputs, axes flattened.
      out: the largest number of outputs.
      dtype: the dtype of the first target.
    """

    rank: int
    in_: int
    out: int
    dtype: DTypeLike


def widest(chosen: Mapping[str, tuple[TargetSpec, KernelSpec]]) -> list[Widest]:
    """Returns the widest sizes for each rank, in ascending order of rank."""
    found: list[Widest] = []
    for rank in sorted({target.rank for target, _ in chosen.values()}):
        own = [both for both in chosen.values() if both[0].rank == rank]
        each = [sizes(kernel, target) for target, kernel in own]
        in_, out = (max(math.prod(size[i]) for size in each) for i in (0, 1))
        found.append(Widest(rank, in_, out, own[0][0].dtype))
    return found


def lent(names: Mapping[str, str], rank: int) -> tuple[tuple[str, str], ...]:
    """Returns pairs of frozen fields and their names in `Base.frozen` for one rank.

    Args:
      names: `{field: name}`, with `{}` in place of the rank.
      rank: the adapter's rank.
    """
    return tuple((field, name.format(rank)) for field, name in names.items())


def require_inputs(kernel: KernelSpec, name: str) -> None:
    """Raises ValueError for an embedding lookup, which has no inputs to act on."""
    if kernel.op == "gather":
        raise ValueError(
            f"{kernel.path}: adapter={name!r} acts on a kernel's inputs, but an "
            "embedding reads token ids; leave it out, or adapt it with 'lora'"
        )


def options(target: TargetSpec, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns hyperparameters: the target's options over the defaults."""
    given = dict(target.options)
    return {name: given.get(name, default) for name, default in defaults.items()}
