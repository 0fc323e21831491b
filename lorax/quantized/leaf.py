"""A quantised leaf: codes in place of a kernel, and what turns them into numbers.

    W = t[codes] * scales + shifts     or     (codes - zeros) * scales + shifts

All arrays have their axes in the order of adapters: stacked axes, inputs, outputs.
Scales have the same axes as the codes, with one entry per tile: 64 scales along an axis
of 4,096 codes mean tiles of 64, as in qwix's `QArray`. Slicing a stack or sharding it
treats every array alike.

Only `dequantize` makes a dense array. A program run by `lorax.adapt` calls it where an
operation reads the kernel, so that only one kernel is dense at a time.

References:
  Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, arXiv:2305.14314.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lorax.quantized import codebooks
from lorax.types import Axes


@flax.struct.dataclass
class NestedScales:
    """Scales that are themselves quantised: the double quantisation of QLoRA.

        scales = t8[codes] * absmax of the block + offset

    Blocks run over the scales of one kernel in the order of its transpose, as in
    bitsandbytes: all inputs of an output, then the next output.

    Attributes:
      codes: uint8 `[*batch, *in, *out]`, with the shape of the scales.
      absmax: `[*batch, blocks]` float32.
      offset: `[*batch]` float32, the mean of the scales.
      inputs: how many axes of `codes` are input axes.
      block: number of scales in a block.
    """

    codes: jax.Array
    absmax: jax.Array
    offset: jax.Array
    inputs: int = flax.struct.field(pytree_node=False, default=1)
    block: int = flax.struct.field(pytree_node=False, default=256)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the scales."""
        return tuple(self.codes.shape)

    def dense(self) -> jax.Array:
        """Returns the scales in float32."""
        batch = self.absmax.ndim - 1
        order = outputs_first(self.codes.ndim, batch, self.inputs)
        moved = self.codes.transpose(order)
        values = codebooks.dynamic_values(moved).reshape(*moved.shape[:batch], -1)
        spread = jnp.repeat(self.absmax, self.block, axis=-1)
        spread = spread[..., : values.shape[-1]]
        scales = values * spread + self.offset[..., None]
        return scales.reshape(moved.shape).transpose(inverse(order))


@flax.struct.dataclass
class Quantized:
    """A frozen leaf stored in a few bits per weight.

    Attributes:
      codes: `[*batch, *in, *out]`, int8, uint8 or an 8-bit float. 4-bit codes are
        packed two to a byte in uint8, and the last input axis is half as long: of every
        `block` inputs the first half is in the upper bits, the second in the lower.
        (XLA has 4-bit types, but on a CPU it widens whole stacks of them; and if a byte
        held neighbours, a TPU would have to interleave rows.)
      scales: one per tile: the same number of axes as `codes`, where the size of each
        divides that of the codes.
      zeros: the code of zero for every tile, or None for 0.
      shifts: added after scaling, one per tile, or None for 0.
      axes: which axes of the kernel are inputs, outputs and stacked.
      block: for 4-bit codes, the size of the blocks within which inputs share bytes; 0
        for eight bits.
      codebook: the name of the table that the codes index, or None if a code is the
        number itself (signed, for four bits).
      dtype: the dtype of the dense kernel.
      activations: True: `adapt` also rounds what is multiplied by the codes to eight
        bits, see `Int8`.
    """

    codes: jax.Array
    scales: jax.Array | NestedScales
    zeros: jax.Array | None = None
    shifts: jax.Array | None = None
    axes: Axes = flax.struct.field(pytree_node=False, default=Axes((0,), (1,)))
    block: int = flax.struct.field(pytree_node=False, default=0)
    codebook: str | None = flax.struct.field(pytree_node=False, default=None)
    dtype: Any = flax.struct.field(pytree_node=False, default=jnp.dtype(jnp.float32))
    activations: bool = flax.struct.field(pytree_node=False, default=False)

    def __jax_array__(self) -> jax.Array:
        """Returns the dense kernel: `jnp.asarray(leaf)` decodes it."""
        return dequantize(self)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the kernel."""
        stored = list(self.codes.shape)
        stored[self.pair_axis] *= 2 if self.block else 1
        return tuple(stored[i] for i in inverse(self.axes.order))

    @property
    def pair_axis(self) -> int:
        """The axis of `codes` along which inputs share bytes: the last of them."""
        return len(self.axes.batch) + len(self.axes.in_) - 1

    @property
    def ndim(self) -> int:
        """The kernel's number of axes."""
        return len(self.codes.shape)

    @property
    def size(self) -> int:
        """The number of weights, not bytes."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The total bytes of all arrays."""
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(self))

    def unnested(self) -> Quantized:
        """Returns the leaf with plain scales, so that it can be cut anywhere."""
        if not isinstance(self.scales, NestedScales):
            return self
        return dataclasses.replace(self, scales=self.scales.dense())

    def specs(
        self, dims: Sequence[Any], parts: Callable[[Any], int] = lambda dim: 1
    ) -> Quantized:
        """Returns the specs of the arrays, given how the kernel is sharded.

        Args:
          dims: an entry of a PartitionSpec for every axis of the kernel.
          parts: the number of parts an entry makes; an axis that it does not divide is
            not sharded.
        """
        stored = [dims[axis] for axis in self.axes.order]

        def spec(array: jax.Array) -> PartitionSpec:
            own = stored  # for nested scales, only the stacked axes
            if len(array.shape) < len(stored):
                own = [*stored[: len(self.axes.batch)], None][: len(array.shape)]
            both = zip(own, array.shape, strict=True)
            fits = [d if n > 1 and n % parts(d) == 0 else None for d, n in both]
            return PartitionSpec(*fits)

        return jax.tree.map(spec, self)

    @property
    def inner_axes(self) -> Axes:
        """The axes of one kernel along the first stacked axis."""
        first, *rest = self.axes.batch
        left = Axes(self.axes.in_, self.axes.out, tuple(rest))
        return Axes(*(tuple(i - (i > first) for i in group) for group in left))

    def layer(self, index: Any) -> Quantized:
        """Returns the kernel at `index` of the first stacked axis."""
        whole = dataclasses.replace(self, axes=self.inner_axes)
        return jax.tree.map(lambda array: array[index], whole)


def inverse(order: Sequence[int]) -> tuple[int, ...]:
    """Returns the permutation that undoes `order`."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def outputs_first(ndim: int, batch: int, inputs: int) -> tuple[int, ...]:
    """Returns the order that brings `[*batch, *in, *out]` to `[*batch, *out, *in]`."""
    reads = range(batch, batch + inputs)
    return (*range(batch), *range(batch + inputs, ndim), *reads)


def packed(codes: jax.Array, axis: int, block: int) -> jax.Array:
    """Returns uint8 codes below 16, packing those half a block apart along an axis."""
    before, after = codes.shape[:axis], codes.shape[axis + 1 :]
    halves = codes.reshape(*before, -1, 2, block // 2, *after)
    first, second = (jax.lax.index_in_dim(halves, i, axis + 1, False) for i in (0, 1))
    return (first << 4 | second).reshape(*before, -1, *after)


def is_quantized(leaf: Any) -> bool:
    """True for a quantised leaf: `jax.tree.map(f, params, is_leaf=is_quantized)`."""
    return isinstance(leaf, Quantized)


@jax.custom_jvp
def guarded(leaf: Quantized) -> Quantized:
    """Returns the leaf, guarded against differentiation.

    Raises:
      TypeError: a derivative is taken with respect to the leaf.
    """
    return leaf


@guarded.defjvp
def _no_derivative(primals: tuple[Quantized], tangents: tuple[Any]) -> Any:
    del tangents
    (leaf,) = primals
    raise TypeError(
        "cannot differentiate with respect to a quantised leaf of shape "
        f"{list(leaf.shape)}: a quantised base does not train. Differentiate with "
        "respect to the adapters alone, the first argument of lorax.adapt(fn)"
    )


def dequantize(leaf: Quantized) -> jax.Array:
    """Returns the dense kernel: decoded in float32, rounded once to `leaf.dtype`.

    Args:
      leaf: a whole leaf, or a part made by slicing all of its arrays alike.

    Raises:
      TypeError: a derivative is taken with respect to the leaf.
    """
    leaf = guarded(leaf)
    wide = jnp.promote_types(leaf.dtype, jnp.float32)
    scales = leaf.scales
    scales = scales.dense() if isinstance(scales, NestedScales) else scales
    grid = Grid.of(leaf.codes.shape, scales.shape, leaf.pair_axis, leaf.block)
    codes, scales = grid.codes(leaf.codes), grid.tiles(scales).astype(wide)
    if leaf.codebook is not None:
        values = codebooks.scaled(leaf.codebook, codes, scales)
    else:
        # 4-bit codes are in two's complement
        values = (codes ^ 8).astype(wide) - 8 if leaf.block else codes.astype(wide)
        if leaf.zeros is not None:
            values = values - grid.tiles(leaf.zeros).astype(wide)
        values = values * scales
    if leaf.shifts is not None:
        values = values + grid.tiles(leaf.shifts).astype(wide)
    values = values.astype(leaf.dtype).reshape(grid.shape)
    return values.transpose(inverse(leaf.axes.order))


class Grid(NamedTuple):
    """An array split into tiles: shapes in which tiles and pairs have their own axes.

    In these shapes every decoding operation is elementwise, so XLA fuses them into one
    loop; with other shapes it would materialise an array of the kernel's size.

    Attributes:
      shape: of the kernel as it is stored.
      split: of the codes, with pairs still packed.
      spread: of arrays with one entry per tile.
      pair: the axis of `split` that indexes the two codes of a pair; None: no pairs.
    """

    shape: tuple[int, ...]
    split: tuple[int, ...]
    spread: tuple[int, ...]
    pair: int | None

    @classmethod
    def of(
        cls,
        stored: Sequence[int],
        counts: Sequence[int],
        paired: int = 0,
        block: int = 0,
    ) -> Grid:
        """Returns the grid of an array.

        Args:
          stored: shape of its codes.
          counts: number of tiles along every axis.
          paired: the axis along which codes share bytes.
          block: as in `Quantized`; 0 if codes do not share bytes.
        """
        shape: list[int] = []
        split: list[int] = []
        spread: list[int] = []
        pair = None
        for axis, (size, count) in enumerate(zip(stored, counts, strict=True)):
            full = 2 * size if block and axis == paired else size
            shape.append(full)
            if block and axis == paired:
                own = count == full  # every input has its own scale
                tiles = 1 if own else count
                pair = len(split) + 2
                split += [tiles, full // tiles // block, 1, block // 2]
                spread += [1, full // block, 2, block // 2] if own else [count, 1, 1, 1]
            elif count in (1, size):
                split.append(size)
                spread.append(count)
            else:
                split += [count, size // count]
                spread += [count, 1]
        return cls(tuple(shape), tuple(split), tuple(spread), pair)

    def codes(self, array: jax.Array) -> jax.Array:
        """Returns the codes by tile, unpacked: upper bits are a block's first half."""
        array = array.reshape(self.split)
        if self.pair is None:
            return array
        behind = [1] * (len(self.split) - 1 - self.pair)
        shifts = jnp.array([4, 0], jnp.uint8).reshape(2, *behind)
        return (array >> shifts) & 15

    def tiles(self, array: jax.Array) -> jax.Array:
        """Returns an array with one entry per tile, reshaped to broadcast."""
        return array.reshape(self.spread)


def by_tile(operation: Any, values: jax.Array, tiles: jax.Array) -> jax.Array:
    """Returns `operation(values, tiles)`, applying each entry to its whole tile."""
    grid = Grid.of(values.shape, tiles.shape)
    return operation(grid.codes(values), grid.tiles(tiles)).reshape(values.shape)
