"""Low-rank updates as stacks of matrices, and which adapters have one."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from lorax import tree
from lorax.adapters import as_lora, bound, layout
from lorax.types import Adapters, Axes, PyTree


def thin(adapters: Adapters, what: str) -> Adapters:
    """Returns those adapters that have factors.

    Raises:
      ValueError: there are none.
    """
    chosen = {path: a for path, a in adapters.items() if _is_thin(a)}
    if not chosen:
        names = sorted({type(adapter).__name__ for adapter in adapters.values()})
        raise ValueError(
            f"{what} reads low-rank factors, and was given "
            f"{', '.join(names) or 'an empty tree'}; pass the dict that lorax.init "
            "returns for at least one lora, dora or adalora target"
        )
    return chosen


def _is_thin(adapter: Any) -> bool:
    """True where the update, a gain apart, is a product of two trained factors."""
    pair = any(field.pair for field in adapter.fields.values())
    return pair or adapter.as_lora() is not None


def on_leaves(
    adapters: Adapters, params: PyTree
) -> tuple[Adapters, dict[str, jax.Array]]:
    """Returns the adapters with their frozen arrays, and the leaf of each.

    Raises:
      KeyError: a path that params lacks.
      ValueError: an adapter that does not fit its leaf.
    """
    leaves, (_, frozen) = tree.flatten(params), tree.split(params)
    tree.require(adapters, leaves, "parameter tree")
    for path, adapter in adapters.items():
        adapter.check(path, leaves[path])
    whole = {path: bound(a, frozen, path) for path, a in adapters.items()}
    return whole, {path: jnp.asarray(leaves[path]) for path in adapters}


def matrices(adapter: Any) -> tuple[jax.Array, jax.Array]:
    """Returns `a: [*stack, in, rank]`, `b: [*stack, rank, out]`, the scale in b.

    At least float32. Only layers that have factors are in the stack.
    """
    plain = as_lora(adapter)
    a, b = plain.a, plain.b
    stack = a.shape[: layout.stack_axes(a, plain.axes)]
    dtype = layout.wide(a, b)
    return (
        a.astype(dtype).reshape(*stack, -1, plain.rank),
        plain.scale * b.astype(dtype).reshape(*stack, plain.rank, -1),
    )


def leaf_matrices(leaf: jax.Array, axes: Axes) -> jax.Array:
    """Returns a kernel as `[*batch, in, out]`, at least float32."""
    in_, out, batch = axes.sizes(leaf.shape)
    ordered = leaf.transpose(axes.order)
    ordered = ordered.reshape(*batch, math.prod(in_), math.prod(out))
    return ordered.astype(layout.wide(leaf))
