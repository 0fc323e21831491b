"""The linear operations: where a kernel meets an activation (lookups: `gather`).

Each rule reads from the equation which dimensions of the kernel are contracted, kept
and batched, and asks the visitor. What `adapt` then emits is in `low_rank`.
"""

from __future__ import annotations

import math

import jax
from jax.extend.core import JaxprEqn

from lorax import _explicit, linalg
from lorax.interpret.rules import joins
from lorax.interpret.terms.tracked import Tracked
from lorax.interpret.uses import rescale
from lorax.interpret.uses.equations import aval
from lorax.interpret.uses.rescale import Pending
from lorax.interpret.uses.use import Dims, Use
from lorax.interpret.walker import Value, Values, Walker, frozen, known, rule


@rule("add")
def add(walker: Walker, eqn: JaxprEqn, values: Values) -> Values | None:
    """The addition that a result waits for (a bias, a residual), or one of kernels."""
    waiting = [value for value in values if isinstance(value, Pending)]
    if not waiting:
        return joins.total(walker, eqn, values)
    if any(value.gain is not None for value in waiting):
        return [_add_rescaled(walker, eqn, values)]
    base = lambda v: v.base if isinstance(v, Pending) else walker.merged(v, eqn)
    bases = [base(value) for value in values]
    branches = [value.branch for value in waiting]
    return [walker.bind(eqn, bases)[0] + sum(branches[1:], start=branches[0])]


def _add_rescaled(walker: Walker, eqn: JaxprEqn, values: Values) -> jax.Array:
    """The addition to a result with a gain: only a bias is added by `rescale.total`.

    The gain's gradient is then read off the sum, so nothing else need be kept. With a
    residual, which may be far larger than the result, it could not be recovered.
    """
    for value, other, atom in zip(values, values[::-1], eqn.invars[::-1], strict=True):
        if not isinstance(value, Pending) or isinstance(other, Pending | Tracked):
            continue
        spread = walker.unbroadcast(atom)
        bias = walker.merged(other, eqn) if spread is None else spread
        if bias.size < value.base.size:
            return rescale.total(value, bias)
    values = [rescale.total(v) if isinstance(v, Pending) else v for v in values]
    return walker.bind(eqn, [walker.merged(value, eqn) for value in values])[0]


@rule("dot_general")
def dot_general(walker: Walker, eqn: JaxprEqn, values: Values) -> Values | None:
    """A contraction of the kernel, on either side, with an activation."""
    if all(isinstance(value, Tracked) for value in values):
        # two kernels: the rows that a lookup returned act as an activation
        values = [walker.merged(v, eqn) if _looked_up(v) else v for v in values]
        if not any(isinstance(value, Tracked) for value in values):
            return None
    if isinstance(values[1], Tracked):
        values = [walker.merged(values[0], eqn), values[1]]
    use = _dot(eqn, values)
    if stacked := [i for i, d in enumerate(use.dims.read) if use.view.gained_by(d)]:
        return _summed_last(walker, eqn, values, stacked)
    return walker.visitor.linear(walker, use)


def _looked_up(value: Value) -> bool:
    return isinstance(value, Tracked) and value.looked_up


def _dot(eqn: JaxprEqn, values: Values) -> Use:
    """A `dot_general` of an activation and a kernel, on either side, as a use."""
    left = isinstance(values[0], Tracked)
    view = known(values[0 if left else 1])
    order = 1 if left else -1  # of the operands, the kernel first
    contracted, batched = eqn.params["dimension_numbers"]
    (read, x_read), (batch, x_batch) = contracted[::order], batched[::order]
    shape = view.value.shape
    write = tuple(d for d in range(len(shape)) if d not in (*read, *batch))
    out = aval(eqn.outvars[0]).shape
    free = 0 if left else len(out) - len(batch) - len(write)
    result = [*batch, *[None] * free, *write]
    return Use(
        op="dot",
        eqn=eqn,
        view=view,
        operands=[view if v is view else frozen(v) for v in values],
        dims=Dims(read=tuple(read), write=write, batch=tuple(batch)),
        flops=2 * math.prod(out) * math.prod(shape[d] for d in read),
        activation=int(left),
        written={d: i for i, d in enumerate(result) if d is not None},
        applied=dict(zip((*batch, *read), (*x_batch, *x_read), strict=True)),
    )


def _summed_last(
    walker: Walker, eqn: JaxprEqn, values: Values, stacked: list[int]
) -> Values:
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
    kept, out = len(batch[0]), aval(eqn.outvars[0]).dtype
    wide = linalg.wide(out)  # one rounding, after the sum

    lies = _explicit.lies(aval(eqn.outvars[0]))
    wanted = [*lies[:kept], *[None] * len(stacked), *lies[kept:]]

    def batched(x: jax.Array, w: jax.Array) -> jax.Array:
        y = _explicit.dot(x, w, numbers, params["precision"], dtype=wide, wanted=wanted)
        return y.sum(range(kept, kept + len(stacked))).astype(out)

    avals = [_explicit.abstract(frozen(v)) for v in values]
    inner = walker.inner(eqn, walker.fork_key())
    return inner.run(jax.make_jaxpr(batched)(*avals), values)


@rule("conv_general_dilated")
def conv(walker: Walker, eqn: JaxprEqn, values: Values) -> Values | None:
    """A convolution with a kernel; a grouped one needs it whole."""
    x, view = values
    if not isinstance(view, Tracked):
        return None
    params, shape = eqn.params, view.value.shape
    # of the kernel: output channels, input channels, window
    _, (to, *read), result = params["dimension_numbers"]
    x, groups = walker.merged(x, eqn), params["feature_group_count"]
    whole = [*read, to] if groups > 1 else read
    if not all(term.whole(d, shape) for term in view.terms for d in whole):
        return None
    op = "conv" if groups == 1 else "grouped_conv"
    if groups > 1 and shape[read[0]] == 1:
        op = "depthwise_conv"
    size = aval(eqn.outvars[0]).size * math.prod(shape[d] for d in read)
    use = Use(
        op=op,
        eqn=eqn,
        view=view,
        operands=[x, view],
        dims=Dims(read=tuple(read), write=(to,)),
        flops=2 * size,
        activation=0,
        written={to: result[1]},
        low_rank=params["batch_group_count"] == 1,
    )
    return walker.visitor.linear(walker, use)


@rule("ragged_dot_general")
def ragged_dot(walker: Walker, eqn: JaxprEqn, values: Values) -> Values | None:
    """A grouped product (mixture of experts) with a whole stack of kernels."""
    x, view, groups = values[0], values[1], frozen(values[2])
    if not isinstance(view, Tracked) or not _is_ragged_dot(eqn, view):
        return None
    numbers, shape = eqn.params["ragged_dot_dimension_numbers"], view.value.shape
    (_, (read,)), _ = numbers.dot_dimension_numbers
    (group,) = numbers.rhs_group_dimensions
    (write,) = (d for d in range(3) if d not in (read, group))
    x = walker.merged(x, eqn)
    if not all(term.whole(d, shape) for term in view.terms for d in range(3)):
        return None
    use = Use(
        op="ragged_dot",
        eqn=eqn,
        view=view,
        operands=[x, view, groups],
        dims=Dims(read=(read,), write=(write,), batch=(group,)),
        flops=2 * x.shape[0] * shape[read] * shape[write],
        activation=0,
        written={group: 0, write: 1},
        groups=groups,
    )
    return walker.visitor.linear(walker, use)


def _is_ragged_dot(eqn: JaxprEqn, view: Tracked) -> bool:
    """True for `jax.lax.ragged_dot`: rows in groups, one axis contracted."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (x_read, read), batch = numbers.dot_dimension_numbers
    return (
        batch == ((), ())
        and tuple(x_read) == (1,)
        and len(read) == 1
        and tuple(numbers.lhs_ragged_dimensions) == (0,)
        and len(numbers.rhs_group_dimensions) == 1
        and view.value.ndim == 3
    )
