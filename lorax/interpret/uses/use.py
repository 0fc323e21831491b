"""One linear use of a kernel: what a rule reads off an equation, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.extend import core

from lorax.interpret.terms.dense import place
from lorax.interpret.terms.tracked import Term, Tracked
from lorax.interpret.uses.equations import aval
from lorax.interpret.uses.taken import Taken
from lorax.types import Axes


class Dims(NamedTuple):
    """The dimensions of a view by their role in a use.

    Attributes:
      read: contracted, in the equation's order.
      write: those that the result has, in view order.
      batch: shared with the activation, in the equation's order.
    """

    read: tuple[int, ...]
    write: tuple[int, ...]
    batch: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Use:
    """One linear use of a view.

    Attributes:
      op: "dot", "conv", "grouped_conv", "depthwise_conv", "gather" or "ragged_dot".
      eqn: the equation.
      view: the kernel.
      operands: of the equation, the view among them.
      dims: of the view, by what the use does with them.
      flops: of one run of the operation on the frozen kernel.
      activation: which operand has the kernel's input; None for a lookup.
      written: for each dimension of the view that the result has, its place there.
      applied: for each dimension of the view that the activation has, its place there;
        {} if a transposed use cannot rescale it.
      groups: how many rows in turn each kernel of a stack serves (ragged_dot).
      taken: how a lookup takes its rows (gather).
      low_rank: False if the result is linear but not in the factors' form (a
        convolution of grouped batches): axes are known, but the kernel is merged.
    """

    op: str
    eqn: core.JaxprEqn
    view: Tracked
    operands: Sequence[jax.Array | Tracked]
    dims: Dims
    flops: int
    activation: int | None
    written: dict[int, int]
    applied: dict[int, int] = dataclasses.field(default_factory=dict)
    groups: jax.Array | None = None
    taken: Taken | None = None
    low_rank: bool = True

    @property
    def out(self) -> jax.core.ShapedArray:
        """The type of the result."""
        return aval(self.eqn.outvars[0])

    @property
    def input(self) -> jax.Array | None:
        """The activation; None for a lookup."""
        if self.activation is None:
            return None
        x = self.operands[self.activation]
        assert not isinstance(x, Tracked)
        return x

    def given(self, x: jax.Array | None) -> Sequence[jax.Array | Tracked]:
        """Returns the operands, with another activation if the use reads one."""
        operands = [*self.operands]
        if self.activation is not None and x is not None:
            operands[self.activation] = x
        return operands

    def axes(self, term: Term) -> Axes | None:
        """Returns how this use reads and writes the term's leaf; None if it is mixed.

        Only a pattern that holds for whole leaf axes counts: no axis both read and
        written, none batched in part.
        """
        leaves = lambda dims: {axis for d in dims for axis in term.labels[d]}
        read, write, batch = map(leaves, self.dims)
        sized = term.sized
        if sized(read & write) or sized((read | write) & batch):
            return None
        if not all(term.whole(d, self.view.value.shape) for d in self.dims.batch):
            return None
        if term.lookup is not None and not (sized(read) and sized(write)):
            return None  # nothing but rows: an embedding
        if any(axes & read and axes & write for axes in term.scaled):
            return None
        write -= read
        batch |= term.indexed - read - write
        rest = set(range(len(term.leaf))) - read - write - batch  # of length one
        if write:
            read |= rest
        else:
            write = rest
        if not read or not write:
            return None
        return Axes(*(tuple(sorted(axes)) for axes in (read, write, batch)))

    def placed(self, term: Term, part: jax.Array) -> jax.Array:
        """Returns a term's part of the result in zeros of the result's shape."""
        start = [0] * part.ndim
        for d in self.dims.write:
            start[self.written[d]] = term.start[d]
        return place(part, start, self.out.shape)
