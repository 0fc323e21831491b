"""The layout of factors relative to their leaf, shared by all parametrisations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lorax import _explicit, tree
from lorax.linalg import wide
from lorax.types import Axes, Factors, Field, LinearMap

Shape = tuple[int, ...]
KERNEL_WORDS = ("batch", "in", "out", "out[1:]", "leaf")
"""Words of `Field.dims` that stand for axes of the kernel."""


def sizes_of(
    words: Sequence[str], sizes: Sequence[Shape], own: Mapping[str, int]
) -> Shape | None:
    """Returns the shape that a field's words require, or None if it is not known.

    Args:
      words: the words of `Field.dims`.
      sizes: (in, out, batch) sizes of what has factors.
      own: sizes of the words that do not stand for kernel axes: rank, and the method's
        own.
    """
    in_, out, batch = sizes
    known = {"batch": batch, "in": in_, "out": out, "out[1:]": out[1:]}
    shape: Shape = ()
    for word in words:
        if word not in known and word not in own:
            return None
        shape += known.get(word, ()) if word in known else (own[word],)
    return shape


def axis_of(adapter: Any, name: str, word: str) -> int:
    """Returns the index of a field's axis named by `word`, a word for a single axis."""
    lengths, words = _lengths(adapter.axes), adapter.fields[name].words
    behind = sum(lengths.get(other, 1) for other in words[words.index(word) + 1 :])
    return getattr(adapter, name).ndim - 1 - behind  # a population's axes lead


def _lengths(axes: Axes) -> dict[str, int]:
    """How many axes each word of `Field.dims` stands for."""
    out = len(axes.out)
    return {
        "batch": len(axes.batch),
        "in": len(axes.in_),
        "out": out,
        "out[1:]": out - 1,
    }


def check(path: str, adapter: Any, leaf: Any) -> None:
    """Raises ValueError unless an adapter's arrays fit a leaf of this shape and dtype.

    Args:
      path: the leaf's path, for the message.
      adapter: has `fields`, `axes` and perhaps `layers`.
      leaf: an array or its abstract form.
    """
    axes: Axes = adapter.axes
    layers = getattr(adapter, "layers", None)
    tree.require_adaptable(path, leaf)
    if sorted(axes.order) != list(range(leaf.ndim)):
        raise ValueError(
            f"{path}: the adapter has {axes}, but the leaf has shape "
            f"{leaf.shape}; was it made for another model?"
        )
    in_, out, batch = axes.sizes(leaf.shape)
    if layers is not None:
        if not batch or max(layers) >= batch[0]:
            raise ValueError(
                f"{path}: layers={layers}, but a leaf with shape {leaf.shape} "
                f"and {axes} has no such layers"
            )
        batch = (len(layers), *batch[1:])
    fields = {n: f for n, f in adapter.fields.items() if not f.frozen}
    found = [tuple(getattr(adapter, name).shape) for name in fields]
    own = _own_sizes(adapter, fields)
    want = [sizes_of(f.words, (in_, out, batch), own) for f in fields.values()]
    if found != want:
        theirs, ours = (" and ".join(map(str, shapes)) for shapes in (found, want))
        raise ValueError(
            f"{path}: the factors have shapes {theirs}, but a kernel of shape "
            f"{leaf.shape} needs {ours}; was the adapter made for another model?"
        )


def _own_sizes(adapter: Any, fields: Mapping[str, Field]) -> dict[str, int]:
    """The sizes of the words that do not stand for kernel axes; first use wins."""
    own: dict[str, int] = {}
    for name, field in fields.items():
        shape = getattr(adapter, name).shape
        for word in field.words:
            if word in KERNEL_WORDS or word in own:
                continue
            axis = axis_of(adapter, name, word)
            if 0 <= axis < len(shape):
                own[word] = shape[axis]
    return own


def spread(
    factor: jax.Array, layers: tuple[int, ...] | None, depth: int, fill: float = 0.0
) -> jax.Array:
    """Returns a factor for the whole stack, with `fill` for layers without one."""
    if layers is None:
        return factor
    lies = [None, *_explicit.entries(factor)[1:]]
    whole = jnp.full((depth, *factor.shape[1:]), fill, factor.dtype)
    whole, factor = (_explicit.moved(x, lies, factor) for x in (whole, factor))
    return whole.at[jnp.asarray(layers)].set(factor)


def chosen(kernel: jax.Array, layers: Sequence[int], axis: int) -> jax.Array:
    """Returns some layers of a stack; on an Explicit mesh the stack is gathered."""
    if not _explicit.is_explicit(kernel):
        return jnp.take(kernel, jnp.asarray(layers), axis)
    lies = _explicit.entries(kernel)
    whole = _explicit.moved(kernel, [*lies[:axis], None, *lies[axis + 1 :]], kernel)
    parts = [jax.lax.slice_in_dim(whole, i, i + 1, axis=axis) for i in layers]
    return jnp.concatenate(parts, axis)


def stack_axes(reads: jax.Array, axes: Axes) -> int:
    """How many leading axes of `[*stack, *in, rank]` index independent matrices."""
    return reads.ndim - 1 - len(axes.in_)


def depth(kernel: jax.Array, axes: Axes) -> int:
    """The number of layers in the stack; 1 if the leaf is not a stack."""
    return kernel.shape[axes.batch[0]] if axes.batch else 1


def product(a: jax.Array, b: jax.Array, axes: Axes, kernel: jax.Array) -> jax.Array:
    """Returns `a @ b` in the leaf's layout and at least float32.

    Args:
      a: `[*batch, *in, rank]`.
      b: `[*batch, rank, *out]`.
      axes: the leaf's axes.
      kernel: the leaf; only its shape, dtype and sharding are read.
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
    """Transposes `[*batch, *in, *out]` to the leaf's order of axes."""
    order = axes.order
    return array.transpose([order.index(axis) for axis in range(len(order))])


def matrices(leaf: jax.Array, axes: Axes) -> jax.Array:
    """Returns a kernel as `[*batch, in, out]` in at least float32, axes flattened."""
    in_, out, batch = axes.sizes(leaf.shape)
    ordered = leaf.astype(wide(leaf)).transpose(axes.order)
    return ordered.reshape(*batch, math.prod(in_), math.prod(out))


def without_product(
    kernel: jax.Array,
    axes: Axes,
    gain: jax.Array | None = None,
    inputs: LinearMap | None = None,
    branch: LinearMap | None = None,
) -> Factors:
    """Returns a form of gains and maps alone: its thin product has rank 0."""
    in_, out, batch = axes.sizes(kernel.shape)
    dtype = wide(kernel)
    a = jnp.zeros((*batch, *in_, 0), dtype)
    return Factors(a, jnp.zeros((*batch, 0, *out), dtype), gain, inputs, branch)


def merged(factors: Factors, axes: Axes, kernel: jax.Array) -> jax.Array:
    """Returns `((I + D) W0 + a b + C) * gain` in the kernel's layout, unrounded."""
    whole = kernel.astype(wide(kernel))
    if (total := added_by(factors, axes, kernel)) is not None:
        whole = whole + total
    if factors.gain is None:
        return whole
    n = len(axes.batch)
    between = tuple(range(n, n + len(axes.in_)))
    gain = in_leaf_order(jnp.expand_dims(factors.gain, between), axes)
    return whole * gain.astype(whole.dtype)


def added_by(factors: Factors, axes: Axes, kernel: jax.Array) -> jax.Array | None:
    """Returns `D W0 + a b + C` in the kernel's layout, at least float32; None if 0."""
    parts = mapped(factors, axes, kernel)
    if factors.a.shape[-1]:
        parts.append(product(factors.a, factors.b, axes, kernel))
    return sum(parts[1:], start=parts[0]) if parts else None


def mapped(factors: Factors, axes: Axes, kernel: jax.Array) -> list[jax.Array]:
    """Returns `D W0` and C for a form's maps, in the leaf's layout."""
    if factors.inputs is None and factors.branch is None:
        return []
    in_, out, batch = axes.sizes(kernel.shape)
    n, m, dtype = math.prod(in_), math.prod(out), wide(kernel)

    def turned(held: LinearMap, w: jax.Array) -> jax.Array:
        """`D w`, by the transpose of `x -> x D`."""
        like = jax.ShapeDtypeStruct((m, n), dtype)
        (back,) = jax.linear_transpose(lambda x: held.apply(held.arrays, x), like)(w.mT)
        return back.mT

    def written(held: LinearMap, w: jax.Array) -> jax.Array:
        del w
        return held.apply(held.arrays, jnp.eye(n, dtype=dtype))

    def part(held: LinearMap, one: Any, kernel: jax.Array) -> jax.Array:
        for _ in batch:
            one = jax.vmap(one)
        exact = jax.tree.map(lambda x: x.astype(dtype), held)
        with jax.default_matmul_precision("highest"):
            found = one(exact, matrices(kernel, axes))
        return in_leaf_order(found.reshape(*batch, *in_, *out), axes)

    return [
        _explicit.automatic(part, (held, one, kernel), kernel)
        for held, one in ((factors.inputs, turned), (factors.branch, written))
        if held is not None
    ]
