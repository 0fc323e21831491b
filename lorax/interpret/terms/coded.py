"""A kernel without a dense value: packed arrays, and how to make the kernel from them.

The program sees a quantised leaf as the dense array that it stands for. In the walk it
is a `Coded` and stays one through every view: views are noted and applied when the
kernel is read, decoding included. A loop over layers slices the packed arrays. So no
more is dense than the current operation reads, in the backward pass too.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lorax import _explicit
from lorax.quantized import Quantized, dequantize
from lorax.quantized.leaf import inverse

ALIKE = "convert_element_type copy copy_p name reduce_precision neg".split()
"""Views that are the same for a stack of kernels and for each of them."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["operands"],
    meta_fields=["run", "shape", "dtype", "alike", "path"],
)
@dataclasses.dataclass(frozen=True)
class Coded:
    """The frozen array of a view, to be computed where it is read.

    Attributes:
      operands: a quantised leaf, or other `Coded`s and arrays.
      run: makes the array from them.
      shape: of the array.
      dtype: likewise.
      alike: True if `run` makes a layer of the array from a layer of its operand.
      path: of the leaf, if the operand is one.
    """

    operands: tuple[Quantized | Coded | jax.Array, ...]
    run: Callable[..., jax.Array]
    shape: tuple[int, ...]
    dtype: jnp.dtype
    alike: bool = False
    path: str = ""

    @classmethod
    def of(cls, leaf: Quantized, path: str = "") -> Coded:
        """Returns a whole leaf."""
        return cls((leaf,), _decoded, leaf.shape, leaf.dtype, alike=True, path=path)

    def of_leaf(self, leaf: Quantized) -> Coded:
        """Returns another form of the leaf."""
        return Coded.of(leaf, self.path)

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    @property
    def leaf(self) -> Quantized | None:
        """The leaf, if this is one, whole or a layer of it."""
        first = self.operands[0]
        return first if isinstance(first, Quantized) else None

    @property
    def paths(self) -> tuple[str, ...]:
        """The leaves that it is made from."""
        inner = (own for x in self.operands if isinstance(x, Coded) for own in x.paths)
        own = (self.path,) if self.path else ()
        return tuple(dict.fromkeys((*own, *inner)))

    def array(self) -> jax.Array:
        """Returns the dense array."""
        return self.run(*map(decoded, self.operands))

    def specs(self, dims: Sequence[Any]) -> Coded:
        """Returns a leaf's tree of specs, for a kernel that is sharded by `dims`."""
        leaf = self.leaf
        assert leaf is not None, "only a leaf can be sharded"
        return dataclasses.replace(self, operands=(leaf.specs(dims),))

    @property
    def stacked(self) -> bool:
        """True if every array that a scan would slice has the layers in front."""
        first = self.operands[0]
        if isinstance(first, Quantized):
            return first.axes.batch[:1] == (0,)
        return self.alike and isinstance(first, Coded) and first.stacked

    def layer(self) -> Coded:
        """Returns the description of one layer, whose arrays have been sliced."""
        first = self.operands[0]
        if isinstance(first, Quantized):
            return self.of_leaf(dataclasses.replace(first, axes=first.inner_axes))
        assert isinstance(first, Coded)
        shape = self.shape[1:]
        return dataclasses.replace(self, operands=(first.layer(),), shape=shape)


def _decoded(leaf: Quantized) -> jax.Array:
    """The dense kernel, sharded on an Explicit mesh as its codes are."""
    like = leaf.codes.transpose(inverse(leaf.axes.order))
    return _explicit.automatic(dequantize, (leaf,), like)


def reading(
    run: Callable[..., Any], operands: Sequence[Any], prevent_cse: bool = True
) -> Any:
    """Returns `run(*operands)`, with every `Coded` decoded.

    Decoding runs once more in the backward pass, which keeps the packed arrays and not
    the kernel. `prevent_cse` is that of `jax.checkpoint`.
    """
    if not any(isinstance(operand, Coded) for operand in operands):
        return run(*operands)
    decode = lambda *operands: run(*map(decoded, operands))
    return jax.checkpoint(decode, prevent_cse=prevent_cse)(*operands)


def decoded(value: Any) -> Any:
    """Returns the dense array of a `Coded`; anything else passes through."""
    return value.array() if isinstance(value, Coded) else value
