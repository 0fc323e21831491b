"""A kernel without a dense value: packed arrays, and what makes the kernel of them.

The program sees a quantised leaf as the dense array that it stands for. In the walk it
is a `Coded`, and stays one through every view: what a view does is noted, and done when
the kernel is read, decoding included. A loop over layers takes a layer of the packed
arrays. So no more is dense than the operation at hand reads, in the backward pass too.
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
      run: makes the array of them.
      shape: of the array.
      dtype: likewise.
      alike: True where `run` makes a layer of the array of a layer of its operand.
      path: of the leaf, where the operand is one.
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
        """The leaf, where this is one, whole or a layer of it."""
        first = self.operands[0]
        return first if isinstance(first, Quantized) else None

    @property
    def paths(self) -> tuple[str, ...]:
        """The leaves that it is made of."""
        inner = (own for x in self.operands if isinstance(x, Coded) for own in x.paths)
        own = (self.path,) if self.path else ()
        return tuple(dict.fromkeys((*own, *inner)))

    def array(self) -> jax.Array:
        """Returns the dense array."""
        return self.run(*map(decoded, self.operands))

    def specs(self, dims: Sequence[Any]) -> Coded:
        """Returns the tree of specs of a leaf, of which `dims` cut the kernel."""
        leaf = self.leaf
        assert leaf is not None, "a leaf alone can be cut"
        return dataclasses.replace(self, operands=(leaf.specs(dims),))

    @property
    def stacked(self) -> bool:
        """True where every array that a scan would cut has the layers in front."""
        first = self.operands[0]
        if isinstance(first, Quantized):
            return first.axes.batch[:1] == (0,)
        return self.alike and isinstance(first, Coded) and first.stacked

    def layer(self) -> Coded:
        """Returns the description of one layer, of which the arrays have been cut."""
        first = self.operands[0]
        if isinstance(first, Quantized):
            return self.of_leaf(dataclasses.replace(first, axes=first.inner_axes))
        assert isinstance(first, Coded)
        shape = self.shape[1:]
        return dataclasses.replace(self, operands=(first.layer(),), shape=shape)


def _decoded(leaf: Quantized) -> jax.Array:
    """The dense kernel, which lies on an Explicit mesh as its codes do."""
    like = leaf.codes.transpose(inverse(leaf.axes.order))
    return _explicit.automatic(dequantize, (leaf,), like)


def reading(
    run: Callable[..., Any], operands: Sequence[Any], prevent_cse: bool = True
) -> Any:
    """Returns `run(*operands)`, a `Coded` decoded for it.

    Decoding runs once more in the backward pass, which keeps the packed arrays and not
    the kernel. `prevent_cse` as of `jax.checkpoint`.
    """
    if not any(isinstance(operand, Coded) for operand in operands):
        return run(*operands)
    decode = lambda *operands: run(*map(decoded, operands))
    return jax.checkpoint(decode, prevent_cse=prevent_cse)(*operands)


def decoded(value: Any) -> Any:
    """Returns the dense array of a `Coded`; anything else passes."""
    return value.array() if isinstance(value, Coded) else value
