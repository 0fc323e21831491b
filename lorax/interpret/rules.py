"""The linear operations: where a kernel meets an activation.

Each rule reads from the equation which dimensions of the kernel are contracted, kept
and batched, and asks the visitor. Under `adapt` it then emits, for every term,

    y = x @ W + (x @ a) @ b            (scale is folded into b)

with the activation as the left operand of every product, the factors cast to the
kernel's dtype, and the sum taken in at least float32 before one cast.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorax.interpret import emit
from lorax.interpret.tracked import Pending, Term, Tracked, place
from lorax.interpret.walker import Walker, rule
from lorax.types import Axes


@dataclasses.dataclass(frozen=True)
class Use:
    """One linear use of a view.

    Attributes:
      op: "dot", "conv", "gather" or "ragged_dot".
      view: the kernel.
      operands: of the equation, the view among them.
      read: dimensions of the view that are contracted, in the equation's order.
      write: dimensions that appear in the result, in view order.
      batch: dimensions shared with the activation, in the equation's order.
      flops: of one run of the operation on the frozen kernel.
      low_rank: False where the result is linear but not in the factors' form
        (grouped convolution): axes are known, the kernel is merged.
    """

    op: str
    view: Tracked
    operands: Sequence[Any]
    read: tuple[int, ...]
    write: tuple[int, ...]
    batch: tuple[int, ...]
    flops: int
    low_rank: bool = True

    def axes(self, term: Term) -> Axes | None:
        """Returns how this use reads and writes the term's leaf, None if it is mixed.

        Only a pattern that holds for whole leaf axes counts: no axis both read and
        written, none batched in part.
        """
        leaves = lambda dims: {axis for d in dims for axis in term.labels[d]}
        read, write, batch = map(leaves, (self.read, self.write, self.batch))
        sized = term.sized
        if sized(read & write) or sized((read | write) & batch):
            return None
        if not all(term.whole(d, self.view.value.shape) for d in self.batch):
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


class Pair(NamedTuple):
    """The two thin factors in the order of a use.

    Attributes:
      first: `[*batch, *read, rank]`, batch and read in view order.
      second: `[*batch, rank, *write]`.
    """

    first: jax.Array
    second: jax.Array


def oriented(use: Use, term: Term, result: Any) -> Pair | None:
    """Returns the term's factors for this use: as made, transposed (tied), or None.

    The first is cast to the kernel's dtype, the second to the result's where that is
    wider: rounding it, and `x @ first`, would then cost more than the kernel's own.
    """
    found = use.axes(term)
    if found is None or not use.low_rank or term.factors is None:
        return None
    sized = lambda axes: tuple(term.sized(group) for group in axes)
    here, made = sized(found), sized(term.axes)
    size = lambda dims: [term.shape[d] for d in sorted(dims)]
    batch, read, write = size(use.batch), size(use.read), size(use.write)
    a, b = term.factors
    rank = a.shape[-1]
    if here == made:
        first, second = a, b
    elif here == (made[1], made[0], made[2]):
        n = len(term.dims("batch"))
        first = jnp.moveaxis(b, n, -1)
        second = jnp.moveaxis(a, -1, n)
    else:
        return None
    dtype = emit.operand_dtype(use.view.value.dtype)
    return Pair(
        first.astype(dtype).reshape(*batch, *read, rank),
        second.astype(jnp.promote_types(dtype, result)).reshape(*batch, rank, *write),
    )


Branch = Callable[[Term, Pair], jax.Array]


def low_rank(walker: Walker, eqn: Any, use: Use, branch: Branch) -> list[Any] | None:
    """Returns the operation's result plus `branch` of every term, or None.

    `branch(term, pair)` gives the term's part, already in the result's full shape. The
    sum is left `Pending` where an addition follows.
    """
    out = eqn.outvars[0].aval
    found = [oriented(use, term, out.dtype) for term in use.view.terms]
    pairs = [pair for pair in found if pair is not None]
    if len(pairs) < len(found):
        return None
    base = frozen(walker, eqn, use)[0]
    wide = jnp.promote_types(out.dtype, jnp.float32)
    parts = zip(use.view.terms, pairs, strict=True)
    first, *more = (branch(term, pair).astype(wide) for term, pair in parts)
    extra = sum(more, start=first)
    if wide == out.dtype and walker.feeds_only_an_add(eqn):
        return [Pending(base, extra)]
    return [(base.astype(wide) + extra).astype(out.dtype)]


@rule("add")
def add(walker: Walker, eqn: Any, values: list[Any]) -> list[jax.Array] | None:
    """The addition that a result waits for: a bias, a residual, another result."""
    waiting = [value for value in values if isinstance(value, Pending)]
    if not waiting:
        return None
    bases = [v.base if isinstance(v, Pending) else v for v in values]
    bases = [walker.merged(base, eqn) for base in bases]
    branches = [value.branch for value in waiting]
    return [walker.bind(eqn, bases)[0] + sum(branches[1:], start=branches[0])]


def frozen(walker: Walker, eqn: Any, use: Use) -> list[jax.Array]:
    """Returns the operation on the frozen kernel alone."""
    values = [use.view.value if v is use.view else v for v in use.operands]
    return walker.bind(eqn, values)


@rule("dot_general")
def dot_general(walker: Walker, eqn: Any, values: list[Any]) -> list[Any] | None:
    """A contraction of the kernel, on either side, with an activation."""
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    if isinstance(values[1], Tracked):
        values = [walker.merged(values[0], eqn), values[1]]
        x, view = values
        x_read, read, x_batch, batch, left = lc, rc, lb, rb, False
    else:
        view, x = values
        x_read, read, x_batch, batch, left = rc, lc, rb, lb, True
    shape = view.value.shape
    write = tuple(d for d in range(len(shape)) if d not in (*read, *batch))
    out = eqn.outvars[0].aval
    flops = 2 * math.prod(out.shape) * math.prod(shape[d] for d in read)
    use = Use("dot", view, values, tuple(read), write, tuple(batch), flops)

    def branch(term: Term, pair: Pair) -> jax.Array:
        z = emit.dot(
            emit.window(walker, x, term, x_read, read),
            pair.first,
            pair.second,
            read=(x_read, _ranks(read, len(batch))),
            batch=(x_batch, _ranks(batch, 0)),
            precision=eqn.params["precision"],
            dtype=out.dtype,
        )  # [*batch, *x_free, *write]
        kept = len(write)
        if left:  # the kernel was the left operand: its dimensions come first
            z = jnp.moveaxis(
                z, range(z.ndim - kept, z.ndim), range(len(batch), len(batch) + kept)
            )
        first = len(batch) if left else z.ndim - kept
        start = [0] * z.ndim
        start[first : first + kept] = [term.start[d] for d in write]
        return place(z, start, out.shape)

    return walker.visitor.linear(walker, eqn, use, branch)


def _ranks(dims: Sequence[int], offset: int) -> tuple[int, ...]:
    """Positions of view dimensions among themselves in view order."""
    return tuple(offset + sorted(dims).index(d) for d in dims)


@rule("conv_general_dilated")
def conv(walker: Walker, eqn: Any, values: list[Any]) -> list[Any] | None:
    """A convolution: `a` convolves to rank channels, `b` mixes them (1 x 1)."""
    x, view = values
    if not isinstance(view, Tracked):
        return None
    x, params, shape = walker.merged(x, eqn), eqn.params, view.value.shape
    _, k_spec, y_spec = params["dimension_numbers"]
    to, *read = k_spec  # output channels, input channels, window
    out = eqn.outvars[0].aval
    single = params["feature_group_count"] == params["batch_group_count"] == 1
    flops = 2 * math.prod(out.shape) * math.prod(shape[d] for d in read)
    use = Use("conv", view, [x, view], tuple(read), (to,), (), flops, low_rank=single)

    def branch(term: Term, pair: Pair) -> jax.Array:
        keep = {
            name: params[name]
            for name in (
                "window_strides",
                "padding",
                "lhs_dilation",
                "rhs_dilation",
                "dimension_numbers",
                "precision",
            )
        }
        dropped = emit.window(walker, x, term, (), ())
        first = jnp.moveaxis(pair.first, -1, to)
        h = jax.lax.conv_general_dilated(dropped, first, **keep)
        features = y_spec[1]
        z = emit.mix(h, pair.second, features, (), params["precision"], out.dtype)
        z = jnp.moveaxis(z, -1, features)
        start = [term.start[to] if d == features else 0 for d in range(z.ndim)]
        return place(z, start, out.shape)

    if not all(term.whole(d, shape) for term in view.terms for d in read):
        return None
    return walker.visitor.linear(walker, eqn, use, branch)


@rule("gather")
def gather(walker: Walker, eqn: Any, values: list[Any]) -> list[Any] | None:
    """An embedding lookup: rows of `a` are looked up, then multiplied by `b`."""
    view, indices = values
    params = eqn.params
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    shape = view.value.shape
    axis = numbers.start_index_map
    whole = all(sizes[d] == n for d, n in enumerate(shape) if d not in axis)
    lookup = (
        len(axis) == 1
        and numbers.collapsed_slice_dims == axis
        and not numbers.operand_batching_dims
        and sizes[axis[0]] == 1
        and whole
        and all(term.whole(axis[0], shape) for term in view.terms)
    )
    if not lookup:
        return None
    write = tuple(d for d in range(len(shape)) if d != axis[0])
    out = eqn.outvars[0].aval
    use = Use("gather", view, values, tuple(axis), write, (), 0)

    def branch(term: Term, pair: Pair) -> jax.Array:
        rank = pair.first.shape[-1]
        ids = indices.ndim - 1
        rows = jax.lax.gather(
            pair.first,  # [vocabulary, rank]
            indices,
            numbers._replace(
                offset_dims=(ids,), collapsed_slice_dims=(0,), start_index_map=(0,)
            ),
            slice_sizes=(1, rank),
            indices_are_sorted=params["indices_are_sorted"],
            unique_indices=params["unique_indices"],
            mode=params["mode"],
            fill_value=0,
        )
        z = emit.mix(rows, pair.second, ids, (), None, out.dtype)  # [*ids, *write]
        z = jnp.moveaxis(z, range(ids, z.ndim), numbers.offset_dims)
        start = [0] * z.ndim
        for dim, place_ in zip(write, numbers.offset_dims, strict=True):
            start[place_] = term.start[dim]
        return place(z, start, out.shape)

    return walker.visitor.linear(walker, eqn, use, branch)


@rule("ragged_dot_general")
def ragged_dot(walker: Walker, eqn: Any, values: list[Any]) -> list[Any] | None:
    """A grouped product (mixture of experts): both factors are grouped alike."""
    x, view, groups = values
    if not isinstance(view, Tracked):
        return None
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    ((x_read, read), batch) = numbers.dot_dimension_numbers
    plain = (
        batch == ((), ())
        and tuple(x_read) == (1,)
        and len(read) == 1
        and tuple(numbers.lhs_ragged_dimensions) == (0,)
        and len(numbers.rhs_group_dimensions) == 1
        and view.value.ndim == 3
    )
    if not plain:
        return None
    x = walker.merged(x, eqn)
    group = numbers.rhs_group_dimensions[0]
    write = tuple(d for d in range(3) if d not in (read[0], group))
    shape = view.value.shape
    if not all(term.whole(d, shape) for term in view.terms for d in range(3)):
        return None
    flops = 2 * x.shape[0] * shape[read[0]] * shape[write[0]]
    use = Use(
        "ragged_dot", view, [x, view, groups], tuple(read), write, (group,), flops
    )

    def branch(term: Term, pair: Pair) -> jax.Array:
        precision = eqn.params["precision"]
        x_ = emit.window(walker, x, term, (), ())
        h = jax.lax.ragged_dot(x_, pair.first, groups, precision=precision)
        return jax.lax.ragged_dot(
            h.astype(pair.second.dtype), pair.second, groups, precision=precision
        )

    return walker.visitor.linear(walker, eqn, use, branch)
