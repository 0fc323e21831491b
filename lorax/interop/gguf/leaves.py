"""Leaves that keep their tensors' codes."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lorax.interop import factors, packed
from lorax.interop.gguf import blocks, header
from lorax.interop.gguf.tensors import Tensor
from lorax.models import table
from lorax.quantized import Quantized
from lorax.quantized.formats import block_of

Part = tuple[Tensor, table.Location]


class Plan(NamedTuple):
    """How to read one leaf.

    Layers that all have the same 4-bit type keep four bits. If the types of a stack
    differ, as in files that give every other layer more bits, all layers get int8 codes
    and scales for the smallest of their tiles: more bytes than in the file, but the
    same weights.

    Attributes:
      parts: a tensor `[out, in]` for each layer, or a single one, and where each goes.
      shape: the leaf's shape.
      dtype: the dtype of the dense kernel.
    """

    parts: Sequence[Part]
    shape: tuple[int, ...]
    dtype: Any

    @property
    def abstract(self) -> Quantized:
        """The leaf, with shapes in place of arrays."""
        axes = factors.axes_of(self.parts[0][1].entry, self._stacked)
        inputs, outputs, batch = axes.sizes(self.shape)
        before, last = (*batch, *inputs[:-1]), inputs[-1]
        forms = [blocks.FORMS[kind] for kind in self._kinds]
        # a tile consists of neighbours on the last input axis, so no head may split it
        tile = math.gcd(last, *(form.tile for form in forms))
        counts = (*before, last // tile, *outputs)
        signed = all(form.signed for form in forms)
        block = 0
        if len(forms) == 1 and forms[0].bits == 4 and tile % 2 == 0:
            block = block_of((*before, last, *outputs), counts, axes)
        wide = np.float32 if any(form.wide for form in forms) else np.float16
        shape: Any = jax.ShapeDtypeStruct
        stored = (*before, last // 2 if block else last, *outputs)
        return Quantized(
            shape(stored, np.uint8 if block else np.int8),
            shape(counts, wide),
            zeros=None if signed or not block else shape(counts, np.int8),
            shifts=None if signed else shape(counts, wide),
            axes=axes,
            block=block,
            dtype=np.dtype(self.dtype),
        )

    def read(self, where: Any) -> Quantized:
        """Returns the leaf; see `packed.assembled`.

        Raises:
          ValueError: a file ends early, or scales are NaN or infinite.
        """
        leaf = self.abstract
        return packed.assembled(leaf, self._layers(leaf), self._stacked, where)

    def _layers(self, leaf: Quantized) -> Iterator[Quantized]:
        """The arrays of each tensor, in the axes of the leaf."""
        inputs = self.parts[0][1].entry.inputs

        def in_axes(rows: np.ndarray, like: jax.Array) -> Any:
            sizes = like.shape[self._stacked :]
            return rows.T.reshape(*sizes[: inputs - 1], -1, *sizes[inputs:])

        for tensor, _ in self.parts:
            yield jax.tree.map(in_axes, _rows(tensor, leaf), leaf)

    @property
    def _kinds(self) -> set[blocks.Type]:
        return {tensor.stored.kind for tensor, _ in self.parts}

    @property
    def _stacked(self) -> bool:
        """Whether the first axis indexes the layers."""
        return self.parts[0][1].layer is not None


def _rows(tensor: Tensor, leaf: Quantized) -> Quantized:
    """The arrays of one tensor as `[out, in]`."""
    found, form = tensor.unpack(), blocks.FORMS[tensor.stored.kind]
    tile = leaf.shape[leaf.axes.in_[-1]] // leaf.scales.shape[leaf.pair_axis]
    spread = functools.partial(np.repeat, repeats=form.tile // tile, axis=1)
    codes: Any = found.codes
    scales = spread(found.scales)
    own: dict[str, Any] = {"scales": scales}
    if leaf.shifts is not None:
        none = found.shifts is None
        own["shifts"] = np.zeros_like(scales) if none else spread(found.shifts)
    if leaf.zeros is not None:  # signed 4-bit codes stand for 0 to 15
        own["zeros"] = np.full_like(scales, -8)
        codes = codes - np.int8(8)
    if leaf.block:
        pairs = (codes.view(np.uint8) & 15).reshape(len(codes), -1, 2, leaf.block // 2)
        codes = (pairs[:, :, 0] << 4 | pairs[:, :, 1]).reshape(len(codes), -1)
    return dataclasses.replace(leaf, codes=codes, **own)


def plans(
    found: Mapping[str, Sequence[Part]], shapes: Mapping[str, Any], dtype: Any
) -> dict[str, Plan]:
    """Returns plans for the linear maps whose codes are kept, by path.

    Args:
      found: the tensors of every leaf.
      shapes: of the leaves.
      dtype: the dtype of the dense kernels.
    """
    made, decoded = {}, {}
    for path, parts in found.items():
        kinds = {tensor.stored.kind for tensor, _ in parts}
        if not parts[0][1].entry.transposed or kinds <= set(header.FLOATS):
            continue
        if odd := kinds - set(blocks.FORMS):
            decoded[path] = ", ".join(sorted(kind.name for kind in odd))
        else:
            made[path] = Plan(parts, shapes[path].shape, dtype)
    if decoded:
        told = "\n".join(f"  {path}: {kinds}" for path, kinds in decoded.items())
        warnings.warn(
            f"leaves of types whose codes cannot be kept are decoded:\n{told}\n"
            "lorax.quantize can quantise them again; with scan=False only the layers "
            "of such types are decoded",
            stacklevel=3,
        )
    return made
