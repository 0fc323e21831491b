"""Matrices quantised by bitsandbytes, and their conversion to kernels.

    NF4:  W[o, i] = table[code] * absmax of the block, blocks along rows
    int8: W[o, i] = code * SCB[o] / 127

With four bits, the first of two codes is in the upper bits of a byte.

References:
  Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, arXiv:2305.14314.
  Dettmers et al., LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale,
  arXiv:2208.07339.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np

from lorax.interop import files
from lorax.quantized import NestedScales, Quantized, codebooks, formats
from lorax.types import Axes


@dataclasses.dataclass(frozen=True)
class Nf4:
    """A matrix `[out, in]` on disk, in 4-bit codes.

    Attributes:
      path: its file.
      key: its name.
      shape: `[out, in]`.
      dtype: the dtype of the decoded weights.
      parts: the tensors of the matrix by the ends of their names, "" for the codes.
      state: the JSON.
    """

    path: pathlib.Path
    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    parts: Mapping[str, files.Tensor]
    state: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """The bytes of the codes."""
        return self.parts[""].nbytes

    def unpack(self, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Quantized:
        """Returns the kernel `[*in, *out]` in NumPy arrays.

        Blocks that cross the end of a row, or a head, are split into smaller ones;
        their scales are then plain.
        """
        axes = _axes(inputs, outputs)
        group = self._group(inputs)
        counts = *np.floor_divide(inputs, formats.tiles(inputs, group)), *outputs
        block = formats.block_of((*inputs, *outputs), counts, axes)
        codes = _bytes(self.parts[""]).read()
        halves = np.stack([codes >> 4, codes & 15], 1).reshape(-1, 2, block // 2)
        pairs = halves[:, 0] << 4 | halves[:, 1]
        stored = *inputs[:-1], inputs[-1] // 2, *outputs
        return Quantized(
            _inputs_first(pairs, stored, len(inputs)),
            self._scales(group, counts, len(inputs)),
            axes=axes,
            block=block,
            codebook="nf4",
            dtype=self.dtype,
        )

    def _group(self, inputs: tuple[int, ...]) -> int:
        """How many inputs share a scale: a block, or a part of one."""
        size = self.state["blocksize"]
        if math.prod(inputs) % size == 0:
            try:
                formats.tiles(inputs, size)
                return size
            except ValueError:  # across heads
                pass
        group = math.gcd(inputs[-1], size)
        if group % 2:
            raise ValueError(
                f"{self.path.name}: {self.key!r} has rows of {inputs[-1]} codes, which "
                "share bytes with their neighbours; load the original model and "
                "quantise that: hf.load(..., quantize=...)"
            )
        return group

    def _scales(self, group: int, counts: tuple[int, ...], inputs: int) -> Any:
        """One per group; nested ones if the groups are the blocks on disk."""
        _require_table(self.parts[".quant_map"], codebooks.NF4)
        size, absmax = self.state["blocksize"], self.parts[".absmax"].read()
        nested = "nested_blocksize" in self.state
        floats = self.parts[".nested_absmax" if nested else ".absmax"]
        above: Any = floats.read()
        _require_scales(floats, above)
        if nested:
            _require_table(self.parts[".nested_quant_map"], codebooks.dynamic_map())
            offset: Any = np.float32(self.state["nested_offset"])
            block = self.state["nested_blocksize"]
            if group == size:
                codes = _inputs_first(absmax, counts, inputs)
                return NestedScales(codes, above, offset, inputs, block)
            spread = np.repeat(above, block)[: absmax.size]
            absmax = codebooks.dynamic_map()[absmax] * spread + offset
        used = np.repeat(absmax, size // group)[: math.prod(counts)]
        return _inputs_first(used, counts, inputs)


@dataclasses.dataclass(frozen=True)
class Int8:
    """A matrix `[out, in]` on disk, in 8-bit codes.

    Attributes:
      path: its file.
      key: its name.
      shape: `[out, in]`.
      dtype: the dtype of the decoded weights.
      codes: `[out, in]`.
      scales: `[out]`, the largest weight of every row.
    """

    path: pathlib.Path
    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    codes: files.Tensor
    scales: files.Tensor

    @property
    def nbytes(self) -> int:
        """The bytes of the codes."""
        return self.codes.nbytes

    def unpack(self, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Quantized:
        """Returns the kernel `[*in, *out]` in NumPy arrays."""
        codes = _inputs_first(self.codes.read(), (*inputs, *outputs), len(inputs))
        largest: Any = self.scales.read()
        _require_scales(self.scales, largest)
        scales = (largest / np.float32(127)).reshape(*[1] * len(inputs), *outputs)
        return Quantized(codes, scales, axes=_axes(inputs, outputs), dtype=self.dtype)


Coded = Nf4 | Int8


def is_coded(tensor: Any) -> TypeGuard[Coded]:
    """True for a quantised matrix."""
    return isinstance(tensor, Coded)


def _require_scales(tensor: files.Tensor, scales: np.ndarray) -> None:
    """Raises ValueError for impossible scales: negative, or all zero."""
    if scales.min() < 0 or not scales.any():
        said = "are all zero" if not scales.any() else "have a negative value"
        raise ValueError(
            f"{tensor.path.name}: {tensor.key!r}: the scales {said}; is the file "
            "damaged?"
        )


def _require_table(tensor: files.Tensor, values: np.ndarray) -> None:
    """Raises ValueError unless the codes index this table, up to rounding."""
    if not np.allclose(tensor.read(), values, rtol=1e-5, atol=0):
        raise ValueError(
            f"{tensor.path.name}: {tensor.key!r} is not the table that bitsandbytes "
            "writes, so the codes would mean something else"
        )


def _bytes(tensor: files.Tensor) -> files.Tensor:
    """The bytes of a tensor, which `bnb_4bit_quant_storage` may declare as floats."""
    return tensor._replace(dtype=np.dtype(np.uint8), shape=(tensor.nbytes,))


def _axes(inputs: Sequence[int], outputs: Sequence[int]) -> Axes:
    """The axes of a kernel `[*in, *out]`."""
    first, last = len(inputs), len(inputs) + len(outputs)
    return Axes(tuple(range(first)), tuple(range(first, last)))


def _inputs_first(rows: np.ndarray, shape: tuple[int, ...], inputs: int) -> Any:
    """Returns values in the order `[*out, *in]` as `[*in, *out]` of this shape."""
    outputs = len(shape) - inputs
    whole = rows.reshape(*shape[inputs:], *shape[:inputs])
    return whole.transpose(*range(outputs, len(shape)), *range(outputs))
