"""The formats, and how a kernel becomes codes: int8, int4, NF4, fp8.

    scale = max |w| of the tile / bound,    code = round(w / scale)

References:
  Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, arXiv:2305.14314 (NF4,
  blocks of 64, double quantisation in blocks of 256).
  Micikevicius et al., FP8 Formats for Deep Learning, arXiv:2209.05433 (e4m3).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp

from lorax.quantized import codebooks
from lorax.quantized.leaf import (
    NestedScales,
    Quantized,
    by_tile,
    inverse,
    outputs_first,
    packed,
)
from lorax.types import Axes


class Format(Protocol):
    """How a kernel is stored."""

    def quantize(self, kernel: jax.Array, axes: Axes) -> Quantized:
        """Returns the leaf that takes the kernel's place."""


@dataclasses.dataclass(frozen=True)
class Int8:
    """Eight bits, symmetric: codes of -128 to 127, to the nearest even.

    Attributes:
      group: inputs that share a scale; None for all inputs of an output.
      activations: True: a dot rounds each token of its input to eight bits by a scale
        of its own, and multiplies integers (W8A8, "w8a8" by name), for hardware that
        does so faster. The gradient passes the rounding by, and branches of adapters
        read the input as it is. Other operations, and uses that contract outputs,
        decode the kernel.

    Raises:
      ValueError: activations with a group, whose scales differ along what is summed.
    """

    group: int | None = None
    activations: bool = False

    def __post_init__(self) -> None:
        """Refuses what has no product of integers."""
        if self.activations and self.group is not None:
            raise ValueError(
                f"Int8(group={self.group}, activations=True): a sum over inputs needs "
                "one scale for all of them; leave group out"
            )

    def quantize(self, kernel: jax.Array, axes: Axes) -> Quantized:
        """Returns int8 codes, and scales in float32."""
        leaf = _linear(kernel, axes, self.group, jnp.dtype(jnp.int8))
        return dataclasses.replace(leaf, activations=self.activations)


@dataclasses.dataclass(frozen=True)
class Int4:
    """Four bits in groups, to the nearest even.

    Attributes:
      group: inputs that share a scale. 64, as NF4's blocks; 128 is as common for larger
        models, and does not divide the widths of small ones.
      symmetric: codes of -8 to 7 about zero; else a code of zero for every group, and
        all sixteen codes between its smallest and largest weight.
    """

    group: int | None = 64
    symmetric: bool = True

    def quantize(self, kernel: jax.Array, axes: Axes) -> Quantized:
        """Returns codes of four bits, and scales in float32."""
        form = _linear if self.symmetric else _affine
        return form(kernel, axes, self.group, jnp.dtype(jnp.int4))


@dataclasses.dataclass(frozen=True)
class Fp8:
    """Eight-bit floats, e4m3 without infinities, up to 448.

    Attributes:
      group: inputs that share a scale; None for all inputs of an output.
    """

    group: int | None = None

    def quantize(self, kernel: jax.Array, axes: Axes) -> Quantized:
        """Returns float8_e4m3fn codes, and scales in float32."""
        return _linear(kernel, axes, self.group, jnp.dtype(jnp.float8_e4m3fn))


@dataclasses.dataclass(frozen=True)
class NF4:
    """Four bits for normally distributed weights, as QLoRA stores them.

    Attributes:
      block: inputs that share a scale.
      double: the scales are quantised to 8 bits themselves: .127 bits a weight in place
        of .5.
    """

    block: int = 64
    double: bool = True

    def quantize(self, kernel: jax.Array, axes: Axes) -> Quantized:
        """Returns the codes and scales of bitsandbytes."""
        values, tile = _laid_out(kernel, axes, self.block)
        absmax = _largest(jnp.abs(values), tile)
        block = block_of(values.shape, absmax.shape, axes)
        scaled = by_tile(
            jnp.multiply, values, 1 / jnp.maximum(absmax, jnp.finfo(jnp.float32).tiny)
        )
        return Quantized(
            packed(codebooks.nearest("nf4", scaled), _last(axes), block),
            _nested(absmax, axes) if self.double else absmax,
            axes=axes,
            block=block,
            codebook="nf4",
            dtype=kernel.dtype,
        )


FORMATS: dict[str, Format] = {
    "int8": Int8(),
    "int4": Int4(),
    "nf4": NF4(),
    "fp8": Fp8(),
    "w8a8": Int8(activations=True),
}
"""The formats by the names that rules and configs give them, with their defaults."""


def recode(leaf: Quantized, kernel: jax.Array) -> Quantized:
    """Returns a leaf with the codes nearest to another kernel; its scales stay.

        code = nearest((w - shift) / scale + zero)

    Whatever the kernel, no entry moves further from it than it was: the old code is
    among the choices.

    Args:
      leaf: of any format.
      kernel: of the leaf's shape.
    """
    dtype = jnp.promote_types(kernel.dtype, jnp.float32)
    values = kernel.transpose(leaf.axes.order).astype(dtype)
    scales = leaf.scales
    scales = scales.dense() if isinstance(scales, NestedScales) else scales
    scales = scales.astype(dtype)
    if leaf.shifts is not None:
        values = by_tile(jnp.subtract, values, leaf.shifts.astype(dtype))
    values = by_tile(jnp.divide, values, jnp.where(scales == 0, jnp.inf, scales))
    if leaf.zeros is not None:
        values = by_tile(jnp.add, values, leaf.zeros.astype(dtype))
    if leaf.codebook is not None:
        codes = codebooks.nearest(leaf.codebook, values)
    else:
        codes = _rounded(
            values, jnp.dtype(jnp.int4) if leaf.block else leaf.codes.dtype
        )
    pairs = in_pairs(codes, leaf.pair_axis, leaf.block)
    return dataclasses.replace(leaf, codes=pairs)


def tiles(inputs: Sequence[int], group: int | None) -> tuple[int, ...]:
    """Returns how a group of inputs lies in the input axes: its size along each.

    Args:
      inputs: sizes of the input axes.
      group: inputs that share a scale, along the last axis and then the one before;
        None for all.

    Raises:
      ValueError: the inputs cannot be cut into such groups.

    Example:
      >>> tiles((32, 128), 64), tiles((32, 16), 64), tiles((32, 16), None)
      ((1, 64), (4, 16), (32, 16))
    """
    left = math.prod(inputs) if group is None else group
    tile = []
    for size in reversed(inputs):
        whole = left >= size
        tile.append(math.gcd(size, left))
        if tile[-1] < (size if whole else left):
            break
        left //= tile[-1]
    if left != 1:
        last = inputs[-1] if inputs else 1
        fits = [str(n) for n in (16, 32, 64, 96, 128, 192, 256) if last % n == 0]
        raise ValueError(
            f"groups of {group} inputs do not divide inputs of {tuple(inputs)}; give "
            f"a group that divides {last}, such as {', '.join(fits) or last}, or None "
            "for one scale an output"
        )
    return (1,) * (len(inputs) - len(tile)) + tuple(reversed(tile))


def block_of(shape: Sequence[int], counts: Sequence[int], axes: Axes) -> int:
    """Returns how many inputs of four bits share bytes: 64, or less in a small tile.

    Args:
      shape: of the codes, before they share bytes.
      counts: tiles along every axis.
      axes: of the kernel.

    Raises:
      ValueError: a tile along the last input axis would part a byte.
    """
    last = _last(axes)
    size, count = shape[last], counts[last]
    block = math.gcd(size if count == size else size // count, 64)
    if block % 2:
        raise ValueError(
            f"codes of four bits share bytes in pairs along the inputs, of which there "
            f"are {size} in {count} groups; use even groups, or eight bits"
        )
    return block


def in_pairs(codes: jax.Array, axis: int, block: int) -> jax.Array:
    """Returns codes of four bits two to a byte, see `Quantized`.

    Args:
      codes: signed ones below 8, or unsigned ones below 16.
      axis: the last input axis.
      block: how many inputs share bytes; 0: the codes stay as they are.
    """
    if not block:
        return codes
    return packed(codes.astype(jnp.int8).astype(jnp.uint8) & 15, axis, block)


def _last(axes: Axes) -> int:
    """The last input axis of `[*batch, *in, *out]`."""
    return len(axes.batch + axes.in_) - 1


def _laid_out(
    kernel: jax.Array, axes: Axes, group: int | None
) -> tuple[jax.Array, tuple[int, ...]]:
    """The kernel as `[*batch, *in, *out]` in float32, and the size of a tile of it.

    Raises:
      ValueError: inputs that cannot be cut into such groups.
    """
    inputs, outputs, batch = axes.sizes(kernel.shape)
    tile = (1,) * len(batch) + tiles(inputs, group) + (1,) * len(outputs)
    return kernel.transpose(axes.order).astype(jnp.float32), tile


def _largest(values: jax.Array, tile: tuple[int, ...]) -> jax.Array:
    """The largest value of every tile."""
    split: list[int] = []
    for size, n in zip(values.shape, tile, strict=True):
        split += [size // n, n]
    return values.reshape(split).max(axis=tuple(range(1, len(split), 2)))


def _linear(
    kernel: jax.Array, axes: Axes, group: int | None, dtype: jnp.dtype
) -> Quantized:
    """Codes that are the numbers themselves, symmetric about zero."""
    values, tile = _laid_out(kernel, axes, group)
    if jnp.issubdtype(dtype, jnp.floating):
        bound = float(jnp.finfo(dtype).max)
    else:  # the last bucket reaches half a step beyond its code
        bound = jnp.iinfo(dtype).max + 0.5
    scales = _nonzero(_largest(jnp.abs(values), tile) / bound)
    codes = _rounded(by_tile(jnp.divide, values, scales), dtype)
    return _leaf(codes, scales, None, axes, kernel.dtype)


def _affine(
    kernel: jax.Array, axes: Axes, group: int | None, dtype: jnp.dtype
) -> Quantized:
    """Codes between the smallest and the largest weight, zero among them."""
    values, tile = _laid_out(kernel, axes, group)
    low, high = jnp.iinfo(dtype).min, jnp.iinfo(dtype).max
    top = jnp.maximum(_largest(values, tile), 0)
    bottom = jnp.minimum(-_largest(-values, tile), 0)
    scales = _nonzero((top - bottom) / (high - low))
    zeros = _rounded(low - bottom / scales, dtype)
    scaled = by_tile(jnp.divide, values, scales)
    codes = _rounded(by_tile(jnp.add, scaled, zeros.astype(jnp.float32)), dtype)
    zeros = zeros.astype(jnp.int8)
    return _leaf(codes, scales, zeros, axes, kernel.dtype)


def _leaf(
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None,
    axes: Axes,
    dtype: jnp.dtype,
) -> Quantized:
    """The leaf of these codes, int4 ones two to a byte."""
    if codes.dtype != jnp.int4:
        return Quantized(codes, scales, zeros, axes=axes, dtype=dtype)
    block = block_of(codes.shape, scales.shape, axes)
    pairs = in_pairs(codes, _last(axes), block)
    return Quantized(pairs, scales, zeros, axes=axes, block=block, dtype=dtype)


def _rounded(values: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The nearest codes, ties to even, none beyond the dtype's ends."""
    if jnp.issubdtype(dtype, jnp.floating):
        ends = jnp.finfo(dtype)
        return jnp.clip(values, float(ends.min), float(ends.max)).astype(dtype)
    whole = jnp.iinfo(dtype)
    return jnp.clip(jnp.round(values), whole.min, whole.max).astype(dtype)


def _nonzero(scales: jax.Array) -> jax.Array:
    """The scales, 1 where a tile holds nothing that a float32 could be divided by."""
    return jnp.where(scales < jnp.sqrt(jnp.finfo(jnp.float32).tiny), 1.0, scales)


def _nested(absmax: jax.Array, axes: Axes, block: int = 256) -> NestedScales:
    """The scales of the blocks, quantised about their mean in blocks of 256."""
    order = outputs_first(absmax.ndim, len(axes.batch), len(axes.in_))
    moved = absmax.transpose(order)
    batch = moved.shape[: len(axes.batch)]
    flat = moved.reshape(*batch, -1)  # [*batch, scales]
    count = flat.shape[-1]
    offset = flat.mean(axis=-1)
    room = [(0, 0)] * len(batch) + [(0, -count % block)]
    cut = jnp.pad(flat - offset[..., None], room).reshape(*batch, -1, block)
    largest = jnp.abs(cut).max(axis=-1)
    scaled = cut * (1 / jnp.where(largest > 0, largest, 1.0))[..., None]
    codes = codebooks.nearest_dynamic(scaled).reshape(*batch, -1)[..., :count]
    codes = codes.reshape(moved.shape).transpose(inverse(order))
    return NestedScales(codes, largest, offset, len(axes.in_), block)
