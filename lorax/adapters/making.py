"""How an adapter is made for a kernel: sizes, matrices, and the target's static fields.

An init chooses the values of the arrays; their shapes follow from the kernel's axes and
the target, and so do the static fields.
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
    """Returns the leaf, or of a stack the layers that get factors."""
    if isinstance(kernel.value, jax.ShapeDtypeStruct):
        raise ValueError(
            f"{kernel.path}: adapter={target.adapter!r} or its init reads the values "
            "of the kernel, which the program computes only when it runs; use "
            "adapter='lora', init='standard'"
        )
    value = jnp.asarray(kernel.value)
    if target.layers is None:
        return value
    return layout.chosen(value, target.layers, kernel.linear_axes().batch[0])


def read(
    kernel: KernelSpec, target: TargetSpec, run: Callable[[jax.Array, Axes], jax.Array]
) -> jax.Array:
    """Returns `run(kernel, axes)` of the layers that get factors.

    Of a quantised leaf it runs on one kernel after the other, so that no more is dense.
    """
    leaf, axes = kernel.value, kernel.linear_axes()
    if not is_quantized(leaf) or leaf.axes != axes:
        return run(chosen_layers(kernel, target), axes)
    return map_kernels(run, chosen(leaf, target.layers) if target.layers else leaf)


def matrices(kernel: KernelSpec, target: TargetSpec) -> jax.Array:
    """Returns the chosen layers as `[*batch, in, out]`, see `layout.matrices`.

    From an Explicit mesh every matrix comes whole.
    """
    value, axes = chosen_layers(kernel, target), kernel.linear_axes()
    lies = _explicit.entries(value)
    whole = [lies[axis] if axis in axes.batch else None for axis in range(value.ndim)]
    return layout.matrices(_explicit.moved(value, whole, value), axes)


def unflatten(
    kernel: KernelSpec, target: TargetSpec, a: jax.Array, b: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gives factors `[*batch, in, r]` and `[*batch, r, out]` the leaf's own axes."""
    in_, out, batch = sizes(kernel, target)
    rank = a.shape[-1]
    return a.reshape(*batch, *in_, rank), b.reshape(*batch, rank, *out)


class Widest(NamedTuple):
    """What frozen arrays must serve that all kernels of one rank share.

    Attributes:
      rank: of the kernels' adapters.
      in_: the most inputs that one of them has, axes flattened.
      out: the most outputs.
      dtype: of the first target.
    """

    rank: int
    in_: int
    out: int
    dtype: DTypeLike


def widest(chosen: Mapping[str, tuple[TargetSpec, KernelSpec]]) -> list[Widest]:
    """Returns for each rank how wide its kernels are, the ranks rising."""
    found: list[Widest] = []
    for rank in sorted({target.rank for target, _ in chosen.values()}):
        own = [both for both in chosen.values() if both[0].rank == rank]
        each = [sizes(kernel, target) for target, kernel in own]
        in_, out = (max(math.prod(size[i]) for size in each) for i in (0, 1))
        found.append(Widest(rank, in_, out, own[0][0].dtype))
    return found


def lent(names: Mapping[str, str], rank: int) -> tuple[tuple[str, str], ...]:
    """Returns frozen fields, and their names in `Base.frozen` for one rank.

    Args:
      names: `{field: name}`, with `{}` where the rank stands.
      rank: of the adapter.
    """
    return tuple((field, name.format(rank)) for field, name in names.items())


def require_inputs(kernel: KernelSpec, name: str) -> None:
    """Raises ValueError for a lookup: it has no inputs for a map of them to act on."""
    if kernel.op == "gather":
        raise ValueError(
            f"{kernel.path}: adapter={name!r} acts on what a kernel reads, and an "
            "embedding reads token ids; leave it out, or adapt it with 'lora'"
        )


def options(target: TargetSpec, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns hyperparameters: their defaults under the target's options."""
    given = dict(target.options)
    return {name: given.get(name, default) for name, default in defaults.items()}
