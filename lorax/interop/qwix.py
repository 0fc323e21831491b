"""Converts parameters quantised by qwix: QArrays to quantised leaves, without loss.

    W = (qvalue - zero_point) * scale

    shapes = qwix.abstract(params)                  # what the model sees
    kernels = lorax.discover(forward, shapes, batch)
    params = qwix.from_qarrays(params, kernels)
    adapters, params = lorax.init(key, params, targets, kernels)

If the model's own code reads its QArrays, leave them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lorax import tree
from lorax.kernels import Kernel
from lorax.quantized import Quantized, formats
from lorax.types import Axes, PyTree

PLAIN = Axes((0,), (1,))


def abstract(params: PyTree) -> PyTree:
    """Returns the tree with the dense shape in place of every QArray.

    Args:
      params: with QArrays as from `qwix.quantize`, or wrapped as by
        `qwix.quantize_params`.

    Returns:
      A tree for `lorax.discover`: shapes where there was a QArray.
    """

    def shape(leaf: Any) -> Any:
        if (held := _held(leaf)) is None:
            return leaf
        return jax.ShapeDtypeStruct(held.qvalue.shape, held.scale.dtype)

    return jax.tree.map(shape, params, is_leaf=_is_held)


def from_qarrays(params: PyTree, kernels: Mapping[str, Kernel] | None = None) -> PyTree:
    """Returns the tree with a quantised leaf in place of every QArray.

    Each represents the values of `qwix.dequantize`, in the dtype of its scales. Codes
    of up to four bits are packed two to a byte if the tiles permit.

    Args:
      params: as for `abstract`.
      kernels: from `discover` on the abstract tree; needed for QArrays that are not
        two-dimensional.

    Returns:
      A tree for `lorax.init`, `adapt` and `merge`.

    Raises:
      ValueError: a QArray's arrays do not fit one another, its scales are not finite,
        or its inputs and outputs are not known; the message names it.
      KeyError: kernels lack a path.
    """

    def converted(keys: tuple[Any, ...], leaf: Any) -> Any:
        if (held := _held(leaf)) is None:
            return leaf
        path = tree.path_name(keys)
        return _leaf(path, held, _axes(path, held, kernels))

    return jax.tree_util.tree_map_with_path(converted, params, is_leaf=_is_held)


def _held(leaf: Any) -> Any:
    """The QArray that a leaf is or that qwix's wrapper holds; None for other leaves.

    They are recognised by name, so that lorax does not depend on qwix.
    """
    name, module = type(leaf).__name__, type(leaf).__module__
    if not module.startswith("qwix."):
        return None
    if name == "WithAux":  # how `qwix.quantize_params` wraps it
        return _held(nn.meta.unbox(leaf.array))
    return leaf if name == "QArray" else None


def _is_held(leaf: Any) -> bool:
    return _held(leaf) is not None


def _axes(path: str, array: Any, kernels: Mapping[str, Kernel] | None) -> Axes:
    """The axes of the leaf's layout."""
    if kernels is not None:
        tree.require([path], kernels, "program given to discover")
        if kernels[path].shape != tuple(array.shape):
            raise ValueError(
                f"{path}: the QArray has shape {tuple(array.shape)}, but discover saw "
                f"{kernels[path].shape}; run discover on qwix.abstract(params)"
            )
        return kernels[path].linear_axes()
    if array.ndim != 2:
        raise ValueError(
            f"{path}: the shape {tuple(array.shape)} does not show which axes are "
            "inputs and which are outputs; pass kernels=lorax.discover(fn, "
            "qwix.abstract(params), batch)"
        )
    return PLAIN


def _leaf(path: str, array: Any, axes: Axes) -> Quantized:
    """The leaf of one QArray."""
    _require_fits(path, array)
    codes = array.qvalue.transpose(axes.order)
    scales, zeros = array.scale.transpose(axes.order), None
    if array.zero_point is not None:  # tiles of scales and zeros may differ
        zeros = array.zero_point.transpose(axes.order)
        counts = tuple(np.lcm(scales.shape, zeros.shape).tolist())
        scales, zeros = _spread(scales, counts), _spread(zeros, counts)
        zeros = zeros.astype(jnp.int8)
    book = "nf4" if array.qtype == "nf4" else None
    codes, block = _stored(codes, scales.shape, axes, book)
    return Quantized(
        codes,
        scales,
        zeros,
        axes=axes,
        block=block,
        codebook=book,
        dtype=jnp.dtype(scales.dtype),
    )


def _stored(
    codes: jax.Array, counts: tuple[int, ...], axes: Axes, book: str | None
) -> tuple[jax.Array, int]:
    """The codes as a leaf stores them, and the block size for shared bytes."""
    if jnp.issubdtype(codes.dtype, jnp.floating):  # 8-bit floats hold all 4-bit ones
        small = codes.dtype == jnp.float4_e2m1fn
        return codes.astype(jnp.float8_e4m3fn) if small else codes, 0
    if book is None and codes.dtype not in (jnp.int4, jnp.int2):
        return codes.astype(jnp.uint8 if codes.dtype == jnp.uint8 else jnp.int8), 0
    try:
        block = formats.block_of(codes.shape, counts, axes)
    except ValueError:  # a tile would split a byte
        return codes.astype(jnp.int8 if book is None else jnp.uint8), 0
    return formats.in_pairs(codes, len(axes.batch + axes.in_) - 1, block), block


def _spread(tiles: jax.Array, counts: tuple[int, ...]) -> jax.Array:
    """Repeats entries for the given, larger number of tiles along every axis."""
    for axis, count in enumerate(counts):
        tiles = jnp.repeat(tiles, count // tiles.shape[axis], axis)
    return tiles


def _require_fits(path: str, array: Any) -> None:
    """Raises ValueError if arrays do not fit one another or scales are not finite."""
    shape = array.qvalue.shape
    for name in ("scale", "zero_point"):
        if (held := getattr(array, name)) is None:
            continue
        tiled = held.ndim == len(shape) and all(
            count and size % count == 0
            for size, count in zip(shape, held.shape, strict=True)
        )
        if not tiled:
            raise ValueError(
                f"{path}: the QArray has codes of shape {shape} and {name} of shape "
                f"{held.shape}, which must have the same number of axes, each dividing "
                "that of the codes; was it reshaped?"
            )
    if tree.is_concrete(array.scale) and not bool(jnp.isfinite(array.scale).all()):
        raise ValueError(
            f"{path}: the QArray has scales that are NaN or infinite; quantise the "
            "kernel again"
        )
