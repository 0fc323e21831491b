"""Matrices in codes of bitsandbytes, and the kernels that they are.

    NF4:  W[o, i] = table[code] * absmax of the block, blocks along rows
    int8: W[o, i] = code * SCB[o] / 127

Of four bits the first of two codes lies in the upper bits of a byte.

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
    """A matrix `[out, in]` on disk, in codes of four bits.

    Attributes:
      path: of its file.
      key: its name.
      shape: `[out, in]`.
      dtype: of the weights that the codes stand for.
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
        """Of the codes."""
        return self.parts[""].nbytes

    def unpack(self, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Quantized:
        """Returns the kernel `[*in, *out]`, in numpy's arrays.

        Blocks that run over the end of a row, or across heads, are cut into smaller
        ones; their scales are then plain.
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
                "share bytes with their neighbours; load the model as it was before, "
                "and quantise that: hf.load(..., quantize=...)"
            )
        return group

    def _scales(self, group: int, counts: tuple[int, ...], inputs: int) -> Any:
        """One for each group; nested ones where the groups are the blocks on disk."""
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
    """A matrix `[out, in]` on disk, in codes of eight bits.

    Attributes:
      path: of its file.
      key: its name.
      shape: `[out, in]`.
      dtype: of the weights that the codes stand for.
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
        """Of the codes."""
        return self.codes.nbytes

    def unpack(self, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Quantized:
        """Returns the kernel `[*in, *out]`, in numpy's arrays."""
        codes = _inputs_first(self.codes.read(), (*inputs, *outputs), len(inputs))
        largest: Any = self.scales.read()
        _require_scales(self.scales, largest)
        scales = (largest / np.float32(127)).reshape(*[1] * len(inputs), *outputs)
        return Quantized(codes, scales, axes=_axes(inputs, outputs), dtype=self.dtype)


Coded = Nf4 | Int8


def is_coded(tensor: Any) -> TypeGuard[Coded]:
    """True for a matrix in codes."""
    return isinstance(tensor, Coded)


def _require_scales(tensor: files.Tensor, scales: np.ndarray) -> None:
    """Raises ValueError for scales that no kernel has: negative, or all zero."""
    if scales.min() < 0 or not scales.any():
        said = "are all zero" if not scales.any() else "hold a negative one"
        raise ValueError(
            f"{tensor.path.name}: {tensor.key!r}: the scales {said}; is the file whole?"
        )


def _require_table(tensor: files.Tensor, values: np.ndarray) -> None:
    """Raises ValueError unless codes point into this table, up to a rounding."""
    if not np.allclose(tensor.read(), values, rtol=1e-5, atol=0):
        raise ValueError(
            f"{tensor.path.name}: {tensor.key!r} is another table than bitsandbytes "
            "writes, and codes mean something else in it"
        )


def _bytes(tensor: files.Tensor) -> files.Tensor:
    """The bytes of a tensor: `bnb_4bit_quant_storage` may call them floats."""
    return tensor._replace(dtype=np.dtype(np.uint8), shape=(tensor.nbytes,))


def _axes(inputs: Sequence[int], outputs: Sequence[int]) -> Axes:
    """Of a kernel `[*in, *out]`."""
    first, last = len(inputs), len(inputs) + len(outputs)
    return Axes(tuple(range(first)), tuple(range(first, last)))


def _inputs_first(rows: np.ndarray, shape: tuple[int, ...], inputs: int) -> Any:
    """What lies as `[*out, *in]`, as `[*in, *out]` of this shape."""
    outputs = len(shape) - inputs
    whole = rows.reshape(*shape[inputs:], *shape[:inputs])
    return whole.transpose(*range(outputs, len(shape)), *range(outputs))
