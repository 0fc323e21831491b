"""One leaf of a Flax tree from its tensors on disk, shard by shard.

A leaf that stacks its layers has one tensor for each of them. Of every tensor a process
reads the bytes that its own shards need, and no others.
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
        """On disk."""

    @property
    def dtype(self) -> np.dtype:
        """Of what is read."""

    def read(self) -> np.ndarray:
        """Returns the whole of it."""

    def read_block(self, rows: slice, columns: slice) -> np.ndarray:
        """Returns a block of a matrix."""


Part = tuple[Tensor, table.Entry]


def read(
    parts: Sequence[Part],
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding,
) -> jax.Array:
    """Returns a leaf in its shards.

    Args:
      parts: the tensors and their entries, in the order of the layers.
      shape: of the leaf.
      sharding: of the leaf.
    """
    stacked = len(shape) > len(parts[0][1].axes)
    dtype = np.result_type(*(tensor.dtype for tensor, _ in parts))

    blocks: dict[Any, np.ndarray] = {}  # replicas ask for the same one

    def shard(index: Any) -> np.ndarray:
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        if bounds not in blocks:
            blocks[bounds] = block([slice(*b) for b in bounds])
        return blocks[bounds]

    def block(own: list[slice]) -> np.ndarray:
        if not stacked:
            return _slice(*parts[0], shape, own)
        stack = np.empty([s.stop - s.start for s in own], dtype)
        for i, layer in enumerate(range(own[0].start, own[0].stop)):
            stack[i] = _slice(*parts[layer], shape[1:], own[1:])
        return stack

    return jax.make_array_from_callback(shape, sharding, shard)


def _slice(
    tensor: Tensor,
    entry: table.Entry,
    shape: tuple[int, ...],
    index: list[slice],
) -> np.ndarray:
    """Reads the part `index` of one layer's leaf of `shape`, and no more bytes."""
    if len(tensor.shape) != 2 or not entry.inputs:
        whole = table.from_disk(tensor.read(), shape, entry)
        return whole[tuple(index)]
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


def _span(
    shape: tuple[int, ...], index: list[slice]
) -> tuple[slice, tuple[int, ...], tuple[slice, ...]]:
    """The rows that hold a block of axes that are one on disk.

    Returns:
      The range on disk, its shape over the axes, and what to take of that.
    """
    inner = math.prod(shape[1:])
    rows = slice(index[0].start * inner, index[0].stop * inner)
    count = index[0].stop - index[0].start
    return rows, (count, *shape[1:]), (slice(None), *index[1:])
