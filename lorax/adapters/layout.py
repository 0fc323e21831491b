"""What the low-rank parametrisations share: how factors lie beside their leaf."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lorax import _explicit, tree
from lorax.linalg import wide
from lorax.types import Axes

Shape = tuple[int, ...]


def check(
    path: str,
    leaf: Any,
    axes: Axes,
    layers: tuple[int, ...] | None,
    rank: int,
    shapes: Sequence[tuple[Shape, str]],
) -> None:
    """Raises ValueError unless factors fit a leaf of this shape and dtype.

    Args:
      path: of the leaf, for the message.
      leaf: an array or its abstract form.
      axes: the adapter's.
      layers: of the first batch axis that have factors; None for all.
      rank: the width of the bottleneck.
      shapes: of each factor, the shape it has and its layout in the letters "i" (in),
        "r" (rank) and "o" (out), batch axes in front.
    """
    tree.require_adaptable(path, leaf)
    if sorted(axes.order) != list(range(leaf.ndim)):
        raise ValueError(
            f"{path}: the adapter has {axes} and the leaf the shape "
            f"{leaf.shape}; was it made for another model?"
        )
    in_, out, batch = axes.sizes(leaf.shape)
    if layers is not None:
        if not batch or max(layers) >= batch[0]:
            raise ValueError(
                f"{path}: layers={layers} of a leaf with shape {leaf.shape} "
                f"and {axes}; no such layers"
            )
        batch = (len(layers), *batch[1:])
    letters = {"i": in_, "r": (rank,), "o": out}
    found = [shape for shape, _ in shapes]
    want = [batch + sum((letters[c] for c in layout), ()) for _, layout in shapes]
    if found != want:
        say = lambda shapes: " and ".join(map(str, shapes))
        raise ValueError(
            f"{path}: the factors have shapes {say(found)}, and a kernel of shape "
            f"{leaf.shape} needs {say(want)}; was the adapter made for another model?"
        )


def spread(
    factor: jax.Array, layers: tuple[int, ...] | None, depth: int, fill: float = 0.0
) -> jax.Array:
    """Returns the factor of a whole stack, `fill` where no layer has one."""
    if layers is None:
        return factor
    lies = [None, *_explicit.entries(factor)[1:]]
    whole = jnp.full((depth, *factor.shape[1:]), fill, factor.dtype)
    whole, factor = (_explicit.moved(x, lies, factor) for x in (whole, factor))
    return whole.at[jnp.asarray(layers)].set(factor)


def chosen(kernel: jax.Array, layers: Sequence[int], axis: int) -> jax.Array:
    """Returns some layers of a stack; from an Explicit mesh the stack comes whole."""
    if not _explicit.is_explicit(kernel):
        return jnp.take(kernel, jnp.asarray(layers), axis)
    lies = _explicit.entries(kernel)
    whole = _explicit.moved(kernel, [*lies[:axis], None, *lies[axis + 1 :]], kernel)
    parts = [jax.lax.slice_in_dim(whole, i, i + 1, axis=axis) for i in layers]
    return jnp.concatenate(parts, axis)


def stack_axes(reads: jax.Array, axes: Axes) -> int:
    """How many leading axes of `[*stack, *in, rank]` number independent matrices."""
    return reads.ndim - 1 - len(axes.in_)


def depth(kernel: jax.Array, axes: Axes) -> int:
    """The number of layers in the stack; 1 where the leaf is none."""
    return kernel.shape[axes.batch[0]] if axes.batch else 1


def product(a: jax.Array, b: jax.Array, axes: Axes, kernel: jax.Array) -> jax.Array:
    """Returns `a @ b` in the leaf's layout and at least float32.

    Args:
      a: `[*batch, *in, rank]`.
      b: `[*batch, rank, *out]`.
      axes: of the leaf.
      kernel: the leaf; only its shape and dtype are read.
    """
    dtype, n = wide(kernel), len(axes.batch)
    lies = _explicit.entries(kernel)
    update = _explicit.dot(
        a.astype(dtype),
        b.astype(dtype),
        (((a.ndim - 1,), (n,)), (tuple(range(n)),) * 2),
        jax.lax.Precision.HIGHEST,
        wanted=[lies[axis] for axis in axes.order],
    )
    return in_leaf_order(update, axes)


def in_leaf_order(array: jax.Array, axes: Axes) -> jax.Array:
    """Transposes `[*batch, *in, *out]` to the leaf's own order of axes."""
    order = axes.order
    return array.transpose([order.index(axis) for axis in range(len(order))])


def added(kernel: jax.Array, delta: jax.Array) -> jax.Array:
    """Returns `kernel + delta`, rounded once to the kernel's dtype."""
    return (kernel.astype(delta.dtype) + delta).astype(kernel.dtype)
