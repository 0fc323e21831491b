"""The formats int8, int4, NF4 and fp8, and how they quantise a kernel.

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
    """Eight bits, symmetric: codes from -128 to 127, rounded to nearest even.

    Attributes:
      group: number of inputs that share a scale; None for all inputs of an output.
      activations: True: a dot product rounds its input to eight bits with one scale per
        token, and multiplies integers (W8A8, named "w8a8"), for hardware where that is
        faster. The gradient bypasses the rounding, and adapter branches read the
        unrounded input. Other operations, and uses that contract the kernel's outputs,
        decode the kernel.

    Raises:
      ValueError: `activations` with a `group`, whose scales differ along the summed
        axis.
    """

    group: int | None = None
    activations: bool = False

    def __post_init__(self) -> None:
        """Refuses groups with `activations`: they allow no integer product."""
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
    """Four bits in groups, rounded to nearest even.

    Attributes:
      group: number of inputs that share a scale; None for all inputs of an output. The
        default is 64, like NF4's blocks; 128 is as common for larger models, but does
        not divide the widths of small ones.
      symmetric: True: codes from -8 to 7 around zero. False: each group has a zero
        point, and its sixteen codes span its smallest to largest weight.
    """

    group: int | None = 64
    symmetric: bool = True

    def quantize(self, kernel: jax.Array, axes: Axes) -> Quantized:
        """Returns 4-bit codes, and scales in float32."""
        form = _linear if self.symmetric else _affine
        return form(kernel, axes, self.group, jnp.dtype(jnp.int4))


@dataclasses.dataclass(frozen=True)
class Fp8:
    """Eight-bit floats, e4m3 without infinities, up to 448.

    Attributes:
      group: number of inputs that share a scale; None for all inputs of an output.
    """

    group: int | None = None

    def quantize(self, kernel: jax.Array, axes: Axes) -> Quantized:
        """Returns float8_e4m3fn codes, and scales in float32."""
        return _linear(kernel, axes, self.group, jnp.dtype(jnp.float8_e4m3fn))


@dataclasses.dataclass(frozen=True)
class NF4:
    """Four bits for normally distributed weights, as QLoRA stores them.

    Attributes:
      block: number of inputs that share a scale.
      double: whether the scales are themselves quantised to 8 bits, which takes 0.127
        bits per weight instead of 0.5.
    """

    block: int = 64
    double: bool = True

    def quantize(self, kernel: jax.Array, axes: Axes) -> Quantized:
        """Returns the same codes and scales as bitsandbytes."""
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
"""The formats by the names used in rules and configs, with their defaults."""


def recode(leaf: Quantized, kernel: jax.Array) -> Quantized:
    """Returns a leaf with the codes nearest to another kernel, keeping its scales.

        code = nearest((w - shift) / scale + zero)

    No entry ends up further from the kernel than it was, whatever the kernel, since the
    old code is among the choices.

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
    """Returns the size of a group of inputs along each input axis.

    Args:
      inputs: sizes of the input axes.
      group: number of inputs that share a scale, filling the last axis and then the one
        before it; None for all.

    Raises:
      ValueError: the inputs cannot be divided into such groups.

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
            "for one scale per output"
        )
    return (1,) * (len(inputs) - len(tile)) + tuple(reversed(tile))


def block_of(shape: Sequence[int], counts: Sequence[int], axes: Axes) -> int:
    """Returns the size of the blocks within which 4-bit inputs share bytes.

    It is 64, or less in a small tile.

    Args:
      shape: of the codes, before they share bytes.
      counts: number of tiles along every axis.
      axes: of the kernel.

    Raises:
      ValueError: a tile along the last input axis would split a byte.
    """
    last = _last(axes)
    size, count = shape[last], counts[last]
    block = math.gcd(size if count == size else size // count, 64)
    if block % 2:
        raise ValueError(
            f"4-bit codes share bytes in pairs along the inputs, but there are {size} "
            f"inputs in {count} groups; use groups of even size, or eight bits"
        )
    return block


def in_pairs(codes: jax.Array, axis: int, block: int) -> jax.Array:
    """Returns 4-bit codes packed two to a byte, see `Quantized`.

    Args:
      codes: signed and below 8, or unsigned and below 16.
      axis: the last input axis.
      block: the size of the blocks within which inputs share bytes; 0 leaves the codes
        as they are.
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
    """The kernel as `[*batch, *in, *out]` in float32, and the shape of its tiles.

    Raises:
      ValueError: the inputs cannot be divided into such groups.
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
    """Codes that are scaled weights themselves, symmetric around zero."""
    values, tile = _laid_out(kernel, axes, group)
    if jnp.issubdtype(dtype, jnp.floating):
        bound = float(jnp.finfo(dtype).max)
    else:  # the last code covers half a step beyond itself
        bound = jnp.iinfo(dtype).max + 0.5
    scales = _nonzero(_largest(jnp.abs(values), tile) / bound)
    codes = _rounded(by_tile(jnp.divide, values, scales), dtype)
    return _leaf(codes, scales, None, axes, kernel.dtype)


def _affine(
    kernel: jax.Array, axes: Axes, group: int | None, dtype: jnp.dtype
) -> Quantized:
    """Codes from the smallest to the largest weight, with zero represented exactly."""
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
    """The leaf with these codes; int4 codes are packed two to a byte."""
    if codes.dtype != jnp.int4:
        return Quantized(codes, scales, zeros, axes=axes, dtype=dtype)
    block = block_of(codes.shape, scales.shape, axes)
    pairs = in_pairs(codes, _last(axes), block)
    return Quantized(pairs, scales, zeros, axes=axes, block=block, dtype=dtype)


def _rounded(values: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The nearest codes, ties to even, clipped to the dtype's range."""
    if jnp.issubdtype(dtype, jnp.floating):
        ends = jnp.finfo(dtype)
        return jnp.clip(values, float(ends.min), float(ends.max)).astype(dtype)
    whole = jnp.iinfo(dtype)
    return jnp.clip(jnp.round(values), whole.min, whole.max).astype(dtype)


def _nonzero(scales: jax.Array) -> jax.Array:
    """The scales, with 1 where a scale is too small to divide by in float32."""
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
