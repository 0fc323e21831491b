"""Reads a leaf of a Flax tree from its tensors on disk, shard by shard.

A leaf that stacks its layers has one tensor or several for each layer; see
`table.Location`. A process reads only the bytes of each tensor that its own shards
need.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np

from lorax.models import table


class Tensor(Protocol):
    """A tensor on disk, such as `lorax.interop.files.Tensor`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape on disk."""

    @property
    def dtype(self) -> np.dtype:
        """The dtype of what `read` returns."""

    def read(self, rows: slice = slice(None)) -> np.ndarray:
        """Returns the whole tensor, or some of its rows."""

    def read_block(self, rows: slice, columns: slice) -> np.ndarray:
        """Returns a block of a matrix."""


Part = tuple[Tensor, table.Location]


def read(
    parts: Sequence[Part],
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding,
) -> jax.Array:
    """Returns a sharded leaf.

    Args:
      parts: the tensors and where they go; together they form the leaf.
      shape: the leaf's shape.
      sharding: the leaf's sharding.
    """
    dtype = np.result_type(*(tensor.dtype for tensor, _ in parts))

    blocks: dict[Any, np.ndarray] = {}  # replicas ask for the same block

    def shard(index: Any) -> np.ndarray:
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        if bounds not in blocks:
            blocks[bounds] = block([slice(*b) for b in bounds])
        return blocks[bounds]

    def block(own: list[slice]) -> np.ndarray:
        if len(parts) == 1 and not parts[0][1].part:
            return _slice(*parts[0], shape, own)  # no copy
        whole = np.empty([s.stop - s.start for s in own], dtype)
        for tensor, place in parts:
            if (at := _within(place.part, own)) is not None:
                whole[at] = _slice(tensor, place, shape, own)
        return whole

    return jax.make_array_from_callback(shape, sharding, shard)


def by_layer(parts: Sequence[Part]) -> list[list[Part]]:
    """Returns the tensors of each layer of a stack, as parts of a separate leaf."""
    found: dict[int | None, list[Part]] = {}
    for tensor, place in parts:
        own = table.Location(place.path, None, place.entry)
        found.setdefault(place.layer, []).append((tensor, own))
    return [found[layer] for layer in sorted(found, key=lambda layer: layer or 0)]


def _within(
    part: tuple[int | slice, ...], own: list[slice]
) -> tuple[int | slice, ...] | None:
    """The index of a part in a block of the leaf; None if it is not in the block."""
    at: list[int | slice] = []
    for index, span in zip(part, own, strict=False):
        if isinstance(index, slice):
            at.append(index)
        elif span.start <= index < span.stop:
            at.append(index - span.start)
        else:
            return None
    return tuple(at)


def _slice(
    tensor: Tensor,
    place: table.Location,
    shape: tuple[int, ...],
    index: list[slice],
) -> np.ndarray:
    """Reads a tensor's part of the block `index` of a leaf, and no other bytes."""
    entry, shape, index = place.entry, place.own(shape), [*place.own(index)]
    if entry.order is not None or not entry.inputs:
        return _rows(tensor, entry, shape, index)
    spans = [
        _span(shape[part], index[part])
        for part in (slice(entry.inputs), slice(entry.inputs, None))
    ]
    if entry.transposed:
        block = tensor.read_block(spans[1][0], spans[0][0]).T
    else:
        block = tensor.read_block(spans[0][0], spans[1][0])
    block = block.reshape(*spans[0][1], *spans[1][1])
    return block[(*spans[0][2], *spans[1][2])]


def _rows(
    tensor: Tensor, entry: table.Entry, shape: tuple[int, ...], index: list[slice]
) -> np.ndarray:
    """As `_slice`, but reads whole rows: for tensors that are not two axis groups."""
    axis = table.rows_of(entry, len(shape))
    if axis is None:
        return table.from_disk(tensor.read(), shape, entry)[tuple(index)]
    rows, sizes = index[axis], [*shape]
    sizes[axis], index[axis] = rows.stop - rows.start, slice(None)
    return table.from_disk(tensor.read(rows), sizes, entry)[tuple(index)]


def _span(
    shape: tuple[int, ...], index: list[slice]
) -> tuple[slice, tuple[int, ...], tuple[slice, ...]]:
    """The rows that hold a block of axes which form one axis on disk.

    Returns:
      The range on disk, its shape over the axes, and the index to apply to that.
    """
    inner = math.prod(shape[1:])
    rows = slice(index[0].start * inner, index[0].stop * inner)
    count = index[0].stop - index[0].start
    return rows, (count, *shape[1:]), (slice(None), *index[1:])
