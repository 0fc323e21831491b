"""The linear operations: where a kernel meets an activation (lookups: `gather`).

Each rule reads from the equation which dimensions of the kernel are contracted, kept
and batched, and asks the visitor. `linear` says what `adapt` then emits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lorax import _explicit, linalg
from lorax.interpret import emit, grouped, joins, rescale
from lorax.interpret.linear import Pair, Use, gained_by
from lorax.interpret.tracked import Pending, Term, Tracked, place
from lorax.interpret.walker import Walker, rule


@rule("add")
def add(walker: Walker, eqn: Any, values: list[Any]) -> list[Any] | None:
    """The addition that a result waits for (a bias, a residual), or one of kernels."""
    waiting = [value for value in values if isinstance(value, Pending)]
    if not waiting:
        return joins.total(walker, eqn, values)
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
    total = lambda v, bias: rescale.total(v.base, v.branch, v.gain, bias, v.again)
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
    if all(isinstance(value, Tracked) for value in values):
        # what a lookup gives is no kernel where it meets one
        values = [walker.merged(v, eqn) if v.looked_up else v for v in values]
        if not any(isinstance(value, Tracked) for value in values):
            return None
    if isinstance(values[1], Tracked):
        values = [walker.merged(values[0], eqn), values[1]]
        x, view = values
        x_read, read, x_batch, batch, left = lc, rc, lb, rb, False
    else:
        view, x = values
        x_read, read, x_batch, batch, left = rc, lc, rb, lb, True
    if stacked := [i for i, d in enumerate(read) if gained_by(view, d)]:
        return _summed_last(walker, eqn, values, stacked)
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

    def product(term: Term, pair: Pair, x: Any) -> jax.Array:
        """The branch as `[*batch, *x_free, *write]`."""
        x = emit.window(x, term, x_read, read)
        how: Any = {
            "precision": eqn.params["precision"],
            "dtype": _result(out, pair),
            "lies": _of_block(lies, term, write, shape),
        }
        if pair.places is None:
            return emit.dot(
                x,
                pair.first,
                pair.second,
                read=(x_read, _ranks(read, len(batch))),
                batch=(x_batch, _ranks(batch, 0)),
                **how,
            )
        met = dict(zip((*x_read, *x_batch), (*read, *batch), strict=True))
        names = tuple(met.get(d, ("x", d)) for d in range(x.ndim))
        return grouped.dot(
            grouped.Named(x, names),
            pair.first,
            pair.second,
            pair.places,
            batch=batch,
            write=write,
            **how,
        )

    def branch(term: Term, pair: Pair, x: Any) -> jax.Array:
        z = product(term, pair, x)
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


def _result(out: Any, pair: Pair) -> jnp.dtype:
    """The branch's dtype: of the operation's result, or wider where its factor is."""
    return linalg.promoted(out.dtype, pair.second.dtype)


def _summed_last(
    walker: Walker, eqn: Any, values: list[Any], stacked: list[int]
) -> list[Any]:
    """A sum over experts whose outputs have gains of their own: batched, then summed.

    Args:
      walker: of the equation.
      eqn: contracts an axis on which a gain depends.
      values: its operands.
      stacked: which of the contracted dimensions those are.
    """
    params = eqn.params
    read, batch = params["dimension_numbers"]
    own = [[dims[i] for i in stacked] for dims in read]
    left, right = ([d for d in r if d not in o] for r, o in zip(read, own, strict=True))
    numbers = (left, right), ([*batch[0], *own[0]], [*batch[1], *own[1]])
    kept, out = len(batch[0]), eqn.outvars[0].aval.dtype
    wide = linalg.wide(out)  # one rounding, after the sum

    lies = _explicit.lies(eqn.outvars[0].aval)
    wanted = [*lies[:kept], *[None] * len(stacked), *lies[kept:]]

    def batched(x: jax.Array, w: jax.Array) -> jax.Array:
        y = _explicit.dot(x, w, numbers, params["precision"], dtype=wide, wanted=wanted)
        return y.sum(range(kept, kept + len(stacked))).astype(out)

    avals = [_explicit.abstract(getattr(v, "value", v)) for v in values]
    inner = walker.inner(eqn, walker.fork_key())
    return inner.run(jax.make_jaxpr(batched)(*avals), values)


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
    """A convolution: `a` convolves to rank channels, `b` mixes them (1 x 1).

    In a grouped one every group is convolved by the same `a`, and its own outputs'
    columns of `b` mix the result.
    """
    x, view = values
    if not isinstance(view, Tracked):
        return None
    x, params, shape = walker.merged(x, eqn), eqn.params, view.value.shape
    _, k_spec, y_spec = params["dimension_numbers"]
    to, *read = k_spec  # output channels, input channels, window
    out = eqn.outvars[0].aval
    groups = params["feature_group_count"]
    op = "conv" if groups == 1 else "grouped_conv"
    if groups > 1 and shape[read[0]] == 1:
        op = "depthwise_conv"
    flops = 2 * math.prod(out.shape) * math.prod(shape[d] for d in read)
    features = y_spec[1]
    use = Use(
        op,
        view,
        [x, view],
        tuple(read),
        (to,),
        (),
        flops,
        activation=0,
        written={to: features},
        low_rank=params["batch_group_count"] == 1,
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
        lies = _explicit.lies(out)
        thin = [None if d == features else e for d, e in enumerate(lies)]
        written = lies.pop(features)
        own = _of_block([*lies, written], term, [to], shape)
        first = jnp.moveaxis(pair.first, -1, to)
        if groups > 1:  # every group is convolved by the same
            first = jnp.concatenate([first] * groups, axis=to)
        h = jax.lax.conv_general_dilated(
            x,
            first,
            **keep,
            feature_group_count=groups,
            out_sharding=_explicit.named(thin, x, first),
        )
        how = params["precision"], _result(out, pair), own
        mix = emit.mix if groups == 1 else functools.partial(_mix_groups, groups)
        z = mix(h, pair.second, features, (), *how)
        z = jnp.moveaxis(z, -1, features)
        start = [term.start[to] if d == features else 0 for d in range(z.ndim)]
        return place(z, start, out.shape)

    whole = [*read, to] if groups > 1 else read
    if not all(term.whole(d, shape) for term in view.terms for d in whole):
        return None
    return walker.visitor.linear(walker, eqn, use, branch)


def _mix_groups(
    groups: int,
    h: jax.Array,
    second: jax.Array,
    feature: int,
    batch: tuple[int, ...],
    precision: jax.lax.PrecisionLike,
    dtype: jnp.dtype,
    lies: Sequence[Any],
) -> jax.Array:
    """`emit.mix` of a grouped convolution: each group mixes its own channels."""
    del batch
    h = jnp.moveaxis(h, feature, -1).astype(second.dtype)
    rank, width = second.shape[0], second.shape[1] // groups
    free = [*lies[:-1]]
    shape = h.shape[:-1]
    h = _explicit.reshape(h, (*shape, groups, rank), (*free, None, None))
    second = _explicit.reshape(second, (rank, groups, width), (None, None, None))
    numbers = ((h.ndim - 1,), (0,)), ((h.ndim - 2,), (1,))
    wanted = [None, *free, None]
    z = _explicit.dot(h, second, numbers, precision, dtype=dtype, wanted=wanted)
    z = jnp.moveaxis(z, 0, -2)  # [*free, groups, width]
    return _explicit.reshape(z, (*shape, groups * width), lies)


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
