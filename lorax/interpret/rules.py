"""The linear operations: where a kernel meets an activation.

Each rule reads from the equation which dimensions of the kernel are contracted, kept
and batched, and asks the visitor. `linear` says what `adapt` then emits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lorax import _explicit
from lorax.interpret import emit
from lorax.interpret.linear import Pair, Use
from lorax.interpret.tracked import Pending, Term, Tracked, place
from lorax.interpret.walker import Walker, rule


@rule("add")
def add(walker: Walker, eqn: Any, values: list[Any]) -> list[jax.Array] | None:
    """The addition that a result waits for: a bias, a residual, another result."""
    waiting = [value for value in values if isinstance(value, Pending)]
    if not waiting:
        return None
    if any(value.gain is not None for value in waiting):
        return [_add_rescaled(walker, eqn, values)]
    bases = [v.base if isinstance(v, Pending) else v for v in values]
    bases = [walker.merged(base, eqn) for base in bases]
    branches = [value.branch for value in waiting]
    return [walker.bind(eqn, bases)[0] + sum(branches[1:], start=branches[0])]


def _add_rescaled(walker: Walker, eqn: Any, values: list[Any]) -> jax.Array:
    """The addition to a result with a gain: a bias joins it before its gradient does.

    The gain's gradient is read off the sum, so that nothing else need be kept; from a
    residual, which may be far larger than the result, it could not be told apart.
    """
    total = lambda v, bias: emit.total(v.base, v.branch, v.gain, bias)
    for value, other, atom in zip(values, values[::-1], eqn.invars[::-1], strict=True):
        if not isinstance(value, Pending) or isinstance(other, Pending | Tracked):
            continue
        bias = walker.spread.get(id(atom), other)
        if bias.size < value.base.size:
            return total(value, bias)
    values = [total(v, None) if isinstance(v, Pending) else v for v in values]
    return walker.bind(eqn, [walker.merged(value, eqn) for value in values])[0]


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
    free = 0 if left else x.ndim - len(read) - len(batch)
    order = [*batch, *[None] * free, *write]  # of the result's dimensions
    use = Use(
        "dot",
        view,
        values,
        tuple(read),
        write,
        tuple(batch),
        flops,
        activation=int(left),
        written={d: i for i, d in enumerate(order) if d is not None},
        applied=dict(zip((*batch, *read), (*x_batch, *x_read), strict=True)),
    )

    lies = _explicit.lies(out)
    if left:  # [*batch, *x_free, *write]
        lies = [*lies[: len(batch)], *lies[len(batch) + len(write) :]]
        lies += _explicit.lies(out)[len(batch) : len(batch) + len(write)]

    def branch(term: Term, pair: Pair, x: Any) -> jax.Array:
        z = emit.dot(
            emit.window(x, term, x_read, read),
            pair.first,
            pair.second,
            read=(x_read, _ranks(read, len(batch))),
            batch=(x_batch, _ranks(batch, 0)),
            precision=eqn.params["precision"],
            dtype=out.dtype,
            lies=_of_block(lies, term, write, shape),
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


def _of_block(
    lies: Sequence[Any], term: Term, write: Sequence[int], shape: Sequence[int]
) -> list[Any]:
    """How a term's part of a result lies: whole where it is a block of a dimension."""
    own = [
        entry if term.whole(d, shape) else None
        for d, entry in zip(write, lies[len(lies) - len(write) :], strict=True)
    ]
    return [*lies[: len(lies) - len(write)], *own]


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
    features = y_spec[1]
    use = Use(
        "conv",
        view,
        [x, view],
        tuple(read),
        (to,),
        (),
        flops,
        activation=0,
        written={to: features},
        low_rank=single,
    )

    def branch(term: Term, pair: Pair, x: Any) -> jax.Array:
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
        first = jnp.moveaxis(pair.first, -1, to)
        lies = _explicit.lies(out)
        thin = [None if d == features else e for d, e in enumerate(lies)]
        written = lies.pop(features)
        h = jax.lax.conv_general_dilated(
            x, first, **keep, out_sharding=_explicit.named(thin, x, first)
        )
        z = emit.mix(
            h,
            pair.second,
            features,
            (),
            params["precision"],
            out.dtype,
            _of_block([*lies, written], term, [to], shape),
        )
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
    written = dict(zip(write, numbers.offset_dims, strict=True))
    use = Use(
        "gather",
        view,
        values,
        tuple(axis),
        write,
        (),
        0,
        activation=None,  # an index: nothing to drop
        written=written,
    )

    def branch(term: Term, pair: Pair, x: Any) -> jax.Array:
        del x
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
        lies = _explicit.lies(out)
        lies = [lies[d] for d in range(out.ndim) if d not in numbers.offset_dims]
        lies += [_explicit.lies(out)[d] for d in numbers.offset_dims]
        lies = _of_block(lies, term, write, shape)
        z = emit.mix(
            rows, pair.second, ids, (), None, out.dtype, lies
        )  # [*ids, *write]
        z = jnp.moveaxis(z, range(ids, z.ndim), numbers.offset_dims)
        start = [0] * z.ndim
        for dim, place_ in written.items():
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
    flops, out = 2 * x.shape[0] * shape[read[0]] * shape[write[0]], eqn.outvars[0].aval
    use = Use(
        "ragged_dot",
        view,
        [x, view, groups],
        tuple(read),
        write,
        (group,),
        flops,
        activation=0,
        written={group: 0, write[0]: 1},
        by_row=lambda gain: jnp.repeat(
            gain, groups, axis=0, total_repeat_length=x.shape[0]
        ),
    )

    def branch(term: Term, pair: Pair, x: Any) -> jax.Array:
        precision = eqn.params["precision"]
        lies = _explicit.lies(out)
        place = lambda *entries: _explicit.named(entries, x, pair.first)
        h = jax.lax.ragged_dot(
            x, pair.first, groups, precision, out_sharding=place(lies[0], None)
        )
        h = h.astype(pair.second.dtype)
        return jax.lax.ragged_dot(
            h, pair.second, groups, precision, out_sharding=place(*lies)
        )

    return walker.visitor.linear(walker, eqn, use, branch)
