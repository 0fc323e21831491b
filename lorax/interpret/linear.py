"""A linear use of a kernel, and its result: the frozen product and the thin branches.

    y = x @ W + (x @ a) @ b            (scale is folded into b)

with the activation as the left operand of every product, the factors cast to the
kernel's dtype, and the sum taken in at least float32 before one cast. A term with a
gain on its outputs multiplies `x @ W` by it, or x where the use is transposed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorax import _explicit, linalg
from lorax.interpret import emit, grouped, maps, rescale
from lorax.interpret.tracked import (
    Pending,
    Term,
    Tracked,
    block_of,
    dense,
    gains,
    place,
    ungained,
)
from lorax.interpret.walker import Walker
from lorax.types import Axes


@dataclasses.dataclass(frozen=True)
class Use:
    """One linear use of a view.

    Attributes:
      op: "dot", "conv", "grouped_conv", "depthwise_conv", "gather" or "ragged_dot".
      view: the kernel.
      operands: of the equation, the view among them.
      read: dimensions of the view that are contracted, in the equation's order.
      write: dimensions that appear in the result, in view order.
      batch: dimensions shared with the activation, in the equation's order.
      flops: of one run of the operation on the frozen kernel.
      activation: which operand has the kernel's input; None for a lookup.
      written: for each dimension of the view that the result has, where it has it.
      applied: for each dimension of the view that the activation has, where; {} where
        a transposed use cannot rescale it.
      by_row: turns a gain `[groups, write]` into one of the result, where the group
        differs from row to row.
      low_rank: False where the result is linear but not in the factors' form
        (a convolution of grouped batches): axes are known, the kernel is merged.
    """

    op: str
    view: Tracked
    operands: Sequence[Any]
    read: tuple[int, ...]
    write: tuple[int, ...]
    batch: tuple[int, ...]
    flops: int
    activation: int | None
    written: dict[int, int]
    applied: dict[int, int] = dataclasses.field(default_factory=dict)
    by_row: Callable[[jax.Array], jax.Array] | None = None
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


class Pair(NamedTuple):
    """The two thin factors in the order of a use.

    Attributes:
      first: `[*batch, *read, rank]`, batch and read in view order.
      second: `[*batch, rank, *write]`.
      tied: True where the use is transposed: it reads what the leaf writes.
      places: None; or, where an axis of the factors has another part in this use (an
        expert axis that it writes or sums over), the dimensions that they have.
    """

    first: jax.Array
    second: jax.Array
    tied: bool
    places: grouped.Places | None = None


def fits(use: Axes, made: Axes) -> bool | None:
    """Tells whether factors made for some axes serve a dot that reads a leaf by others.

    They do where every axis of `in` is read or batched, every axis of `out` written or
    batched; an axis of the batch may be anything, since both factors have it. For axes
    longer than one.

    Returns:
      False: as made. True: transposed (tied). None: the product has no low-rank form.
    """
    read, write, _ = map(set, use)
    for tied, (in_, out) in enumerate([(made.in_, made.out), (made.out, made.in_)]):
        if not write & {*in_} and not read & {*out}:
            return bool(tied)
    return None


def oriented(use: Use, term: Term, result: Any) -> Pair | None:
    """Returns the term's factors for this use: as made, transposed (tied), or None.

    The first is cast to the kernel's dtype, the second to the result's where that is
    wider: rounding it, and `x @ first`, would then cost more than the kernel's own.
    """
    found = use.axes(term)
    if found is None or not use.low_rank or term.factors is None or term.axes is None:
        return None
    sized = lambda axes: Axes(*(tuple(sorted(term.sized(group))) for group in axes))
    here, made = sized(found), sized(term.axes)
    tied = fits(here, made)
    if tied is None or not maps.acts(use, term):
        return None
    a, b = term.factors[:2]
    n, rank = len(term.dims("batch")), a.shape[-1]
    first, second = (jnp.moveaxis(b, n, -1), jnp.moveaxis(a, -1, n)) if tied else (a, b)
    size = lambda dims: [term.shape[d] for d in dims]
    batch, read, write = sorted(use.batch), sorted(use.read), sorted(use.write)
    places = None
    plain = here == (Axes(made.out, made.in_, made.batch) if tied else made)
    if not plain or any(map(term.added, (*use.read, *use.write))):
        if use.op != "dot" or term.factors.maps:
            return None
        places = _places(term, tied)
        if places is None:
            return None
        batch, write = list(places.both), list(places.second)
        read = [d for d in places.first if d not in batch]
    dtype = emit.operand_dtype(use.view.value.dtype)
    return Pair(
        first.astype(dtype).reshape(*size(batch), *size(read), rank),
        second.astype(linalg.promoted(dtype, result)).reshape(
            *size(batch), rank, *size(write)
        ),
        tied,
        places,
    )


def _places(term: Term, tied: bool) -> grouped.Places | None:
    """The dimensions that a term's factors have; those of length one are left out."""
    dims = range(len(term.labels))
    own = [d for d in dims if term.shape[d] > 1 or term.sized(term.labels[d])]
    kinds = {d: term.kind(d) for d in own}
    if None in kinds.values():
        return None
    of = lambda kind: tuple(d for d in own if kinds[d] == kind)
    both, read, write = of("batch"), of("in"), of("out")
    if tied:
        read, write = write, read
    return grouped.Places((*both, *read), both, write)


Branch = Callable[[Term, Pair, Any], jax.Array]


@maps.precisely
def low_rank(walker: Walker, eqn: Any, use: Use, branch: Branch) -> list[Any] | None:
    """Returns the operation's result plus `branch` of every term, or None.

    `branch(term, pair, x)` gives the term's part for an activation, already in the
    result's full shape. The sum is left `Pending` where an addition follows.
    """
    out, terms = eqn.outvars[0].aval, use.view.terms
    result = out.dtype
    if any(map(_gained, terms)) and result == jnp.float16:
        result = jnp.dtype(jnp.float32)  # a gradient times a small gain would vanish
    found = [oriented(use, term, result) for term in terms]
    pairs = [pair for pair in found if pair is not None]
    if len(pairs) < len(found):
        return None
    wide = linalg.wide(out.dtype)
    x: Any = None if use.activation is None else use.operands[use.activation]
    kept = [x if x is None else emit.dropped(x, t, walker.fork_key()) for t in terms]
    gain: Any = None
    tied = pairs[0].tied
    if any(map(_gained, terms)):
        gain = _gain(use, len(out.shape) if not tied else x.ndim, pairs)
        if gain is None or (len(terms) > 1 and any(x_ is not x for x_ in kept)):
            return None
    rest, base_x = None, x
    if gain is not None and tied:  # (W * gain)^T reads x * gain
        gain = _explicit.like(gain, x)
        to = linalg.wide(x, gain)
        times = lambda x_, gain: x_.astype(to) * gain.astype(to)
        base_x = times(x, gain)
        if kept[0] is not x:
            base_x = x.astype(to) + times(kept[0], gain - 1)
        base_x = base_x.astype(x.dtype)
        kept, gain = [times(x_, gain).astype(x.dtype) for x_ in kept], None
    elif gain is not None and kept[0] is not x:
        # what is dropped does not enter the rescaled part, and keeps its size
        base_x, rest = kept[0], frozen(walker, eqn, use, x - kept[0]).astype(wide)
    turn = next((t for t in terms if t.factors and t.factors.inputs is not None), None)
    if turn is not None and rest is not None:
        return None
    if turn is not None and not tied:
        base_x = maps.turned(use, turn, base_x)
    base = frozen(walker, eqn, use, base_x)
    if turn is not None and tied:
        base = maps.turned_back(use, turn, base)
    added = []
    for part in zip(terms, pairs, kept, strict=True):
        added += [
            _explicit.like(p, base) for p in _parts(use, branch, part, base, wide)
        ]
    if not added and gain is None:
        return [base]
    extra = sum(added[1:], start=added[0]) if added else jnp.zeros((), wide)
    if gain is not None and (spec := jax.typeof(base).sharding.spec).unreduced:
        sides = _explicit.summed(base), _explicit.summed(extra)
        rest = None if rest is None else _explicit.summed(rest)
        return [_explicit.moved(rescale.total(*sides, gain, rest), spec, base)]
    again = None if gain is None else _again(eqn, use, base_x)
    if wide == out.dtype and rest is None and walker.feeds_only_an_add(eqn):
        return [Pending(base, extra, gain, again)]
    return [rescale.total(base, extra, gain, rest, again)]


def _parts(
    use: Use, branch: Branch, part: tuple[Term, Pair, Any], base: Any, wide: Any
) -> list[jax.Array]:
    """What one term adds to a result: its thin product, and its map of the input."""
    term, pair, x = part
    assert term.factors is not None
    parts = [branch(*part).astype(wide)] if pair.first.shape[-1] else []
    if term.factors.branch is not None:
        dims = [d for d in use.read if d in use.applied]
        x = emit.window(x, term, [use.applied[d] for d in dims], dims)
        own = maps.branch(use, term, x, pair.tied, base).astype(wide)
        start = [0] * own.ndim
        for d in use.write:
            start[use.written[d]] = term.start[d]
        parts.append(place(own, start, base.shape))
    return parts


@maps.precisely
def branches(walker: Walker, eqn: Any, use: Use, branch: Branch) -> jax.Array | None:
    """Returns the branches of all terms without the frozen product, or None."""
    out, terms = eqn.outvars[0].aval, use.view.terms
    pairs = [oriented(use, term, out.dtype) for term in terms]
    if any(map(_gained, terms)):
        return None
    wide = linalg.wide(out.dtype)
    x: Any = None if use.activation is None else use.operands[use.activation]
    parts: list[jax.Array] = []
    for term, pair in zip(terms, pairs, strict=True):
        if pair is None or term.factors is None or term.factors.inputs is not None:
            return None
        kept = x if x is None else emit.dropped(x, term, walker.fork_key())
        for part in _parts(use, branch, (term, pair, kept), out, wide):
            parts.append(_explicit.like(part, parts[0]) if parts else part)
    return sum(parts[1:], start=parts[0])


def frozen(walker: Walker, eqn: Any, use: Use, x: Any = None) -> jax.Array:
    """Returns the operation on the frozen kernel alone, of `x` if that is given."""
    values = [use.view.value if v is use.view else v for v in use.operands]
    if x is not None and use.activation is not None:
        values[use.activation] = x
    return walker.bind(eqn, values)[0]


def _again(eqn: Any, use: Use, x: Any) -> rescale.Again | None:
    """How some outputs of a use are computed again, from the merged kernel.

    None where its result is not made of blocks: a lookup, rows in groups, a mesh.
    """
    view = use.view
    whole = lambda d: all(term.whole(d, view.value.shape) for term in view.terms)
    dims = [d for d in use.write if d in use.written and whole(d)]
    plain = use.op == "dot" or (
        use.op == "conv" and eqn.params["feature_group_count"] == 1
    )
    mapped = any(term.factors and term.factors.maps for term in view.terms)
    if x is None or not plain or not dims or mapped:
        return None
    if _explicit.is_explicit(view.value, x) or not emit.alone(view.value):
        return None
    dim = max(dims, key=lambda d: view.value.shape[d])
    rest = [x if i == use.activation else None for i, _ in enumerate(use.operands)]

    def run(operands: Any, begin: jax.Array, size: int) -> jax.Array:
        view, *others = operands
        kernel = dense(block_of(view, dim, begin, size))
        values = [kernel if v is None else v for v in others]
        return eqn.primitive.bind(*values, **eqn.params)  # of another shape than eqn's

    return rescale.Again(run, (ungained(view), *rest), use.written[dim])


def _gained(term: Term) -> bool:
    return term.factors is not None and term.factors.gain is not None


def gained_by(view: Tracked, dim: int) -> bool:
    """True where a dimension numbers kernels with gains of their own."""
    return any(
        _gained(term) and term.shape[dim] > 1 and term.kind(dim) == "batch"
        for term in view.terms
    )


def _gain(use: Use, ndim: int, pairs: Sequence[Pair]) -> jax.Array | None:
    """Returns the gains of a view along the result, or in a tied use the activation.

    None where they do not factor out: a kernel that holds only some of a term's inputs,
    uses of both orientations at once.
    """
    shape, gained = use.view.value.shape, [*filter(_gained, use.view.terms)]
    whole = all(t.whole(d, shape) for t in gained for d in t.dims("in"))
    places = use.applied if pairs[0].tied else use.written
    if len({pair.tied for pair in pairs}) > 1 or not places or not whole:
        return None
    dims = sorted(places, key=places.__getitem__)
    needed = {d for t in gained for k in ("batch", "out") for d in t.dims(k)}
    if not needed <= set(dims):  # a gain per expert, and the use sums over experts
        return None

    def along(term: Term) -> Any:
        gain: Any = gains(term, dims, shape)
        if use.by_row is not None:
            return use.by_row(gain)
        sizes = dict(zip(map(places.get, dims), gain.shape, strict=True))
        return gain.reshape([sizes.get(d, 1) for d in range(ndim)])

    return math.prod(map(along, gained))
