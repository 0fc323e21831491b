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

from lorax import _explicit
from lorax.interpret import emit
from lorax.interpret.tracked import Pending, Term, Tracked, gains
from lorax.interpret.walker import Walker
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
      activation: which operand has the kernel's input; None for a lookup.
      written: for each dimension of the view that the result has, where it has it.
      applied: for each dimension of the view that the activation has, where; {} where
        a transposed use cannot rescale it.
      by_row: turns a gain `[groups, write]` into one of the result, where the group
        differs from row to row.
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
    """

    first: jax.Array
    second: jax.Array
    tied: bool


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
    a, b, _ = term.factors
    rank, tied = a.shape[-1], here != made
    if not tied:
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
        tied,
    )


Branch = Callable[[Term, Pair, Any], jax.Array]


def low_rank(walker: Walker, eqn: Any, use: Use, branch: Branch) -> list[Any] | None:
    """Returns the operation's result plus `branch` of every term, or None.

    `branch(term, pair, x)` gives the term's part for an activation, already in the
    result's full shape. The sum is left `Pending` where an addition follows.
    """
    out, terms = eqn.outvars[0].aval, use.view.terms
    found = [oriented(use, term, out.dtype) for term in terms]
    pairs = [pair for pair in found if pair is not None]
    if len(pairs) < len(found):
        return None
    wide = jnp.promote_types(out.dtype, jnp.float32)
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
        base_x = (x + kept[0] * (gain - 1) if kept[0] is not x else x * gain).astype(
            x.dtype
        )
        kept, gain = [(x_ * gain).astype(x.dtype) for x_ in kept], None
    elif gain is not None and kept[0] is not x:
        # what is dropped does not enter the rescaled part, and keeps its size
        base_x, rest = kept[0], frozen(walker, eqn, use, x - kept[0]).astype(wide)
    base = frozen(walker, eqn, use, base_x)
    parts = zip(terms, pairs, kept, strict=True)
    first, *more = (_explicit.like(branch(*part).astype(wide), base) for part in parts)
    extra = sum(more, start=first)
    if gain is not None and (spec := jax.typeof(base).sharding.spec).unreduced:
        sides = _explicit.summed(base), _explicit.summed(extra)
        rest = None if rest is None else _explicit.summed(rest)
        return [_explicit.moved(emit.total(*sides, gain, rest), spec, base)]
    if wide == out.dtype and rest is None and walker.feeds_only_an_add(eqn):
        return [Pending(base, extra, gain)]
    return [emit.total(base, extra, gain, rest)]


def frozen(walker: Walker, eqn: Any, use: Use, x: Any = None) -> jax.Array:
    """Returns the operation on the frozen kernel alone, of `x` if that is given."""
    values = [use.view.value if v is use.view else v for v in use.operands]
    if x is not None and use.activation is not None:
        values[use.activation] = x
    return walker.bind(eqn, values)[0]


def _gained(term: Term) -> bool:
    return term.factors is not None and term.factors.gain is not None


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

    def along(term: Term) -> Any:
        gain: Any = gains(term, dims, shape)
        if use.by_row is not None:
            return use.by_row(gain)
        sizes = dict(zip(map(places.get, dims), gain.shape, strict=True))
        return gain.reshape([sizes.get(d, 1) for d in range(ndim)])

    return math.prod(map(along, gained))
