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


Branch = Callable[[Term, Pair, "jax.Array | None"], jax.Array]


def low_rank(walker: Walker, eqn: Any, use: Use, branch: Branch) -> list[Any] | None:
    """Returns the operation's result plus `branch` of every term, or None.

    `branch(term, pair, key)` gives the term's part, already in the result's full shape.
    The sum is left `Pending` where an addition follows.
    """
    out = eqn.outvars[0].aval
    found = [oriented(use, term, out.dtype) for term in use.view.terms]
    pairs = [pair for pair in found if pair is not None]
    if len(pairs) < len(found):
        return None
    wide = jnp.promote_types(out.dtype, jnp.float32)
    keys = [walker.fork_key() for _ in pairs]
    if any(_gained(term) for term in use.view.terms):
        base = rescaled(walker, eqn, use, pairs, keys)
    else:
        base = frozen(walker, eqn, use)
    if base is None:
        return None
    parts = zip(use.view.terms, pairs, keys, strict=True)
    first, *more = (branch(*part).astype(wide) for part in parts)
    extra = sum(more, start=first)
    if wide == out.dtype and walker.feeds_only_an_add(eqn):
        return [Pending(base, extra)]
    return [(base.astype(wide) + extra).astype(out.dtype)]


def frozen(walker: Walker, eqn: Any, use: Use, x: Any = None) -> jax.Array:
    """Returns the operation on the frozen kernel alone, of `x` if that is given."""
    values = [use.view.value if v is use.view else v for v in use.operands]
    if x is not None and use.activation is not None:
        values[use.activation] = x
    return walker.bind(eqn, values)[0]


def rescaled(
    walker: Walker,
    eqn: Any,
    use: Use,
    pairs: Sequence[Pair],
    keys: Sequence[jax.Array | None],
) -> jax.Array | None:
    """Returns the operation on `W * gain` in at least float32, or None.

    None where a gain does not factor out: a kernel that holds only some of a term's
    inputs, or uses of both orientations at once. Under dropout the dropped input x~
    goes through the rescaled part, `x @ W + (x~ @ W) * (gain - 1)`.
    """
    out, shape = eqn.outvars[0].aval, use.view.value.shape
    tied = {pair.tied for pair in pairs}
    places = use.applied if tied == {True} else use.written
    gained = [
        (term, key)
        for term, key in zip(use.view.terms, keys, strict=True)
        if _gained(term)
    ]
    whole = all(t.whole(d, shape) for t, _ in gained for d in t.dims("in"))
    if len(tied) > 1 or not places or not whole:
        return None
    wide = jnp.promote_types(out.dtype, jnp.float32)
    run = lambda x: frozen(walker, eqn, use, x).astype(wide)
    x: Any = None if use.activation is None else use.operands[use.activation]
    ndim = x.ndim if tied == {True} else len(out.shape)
    dims = sorted(places, key=places.__getitem__)

    def along(term: Term) -> Any:
        gain: Any = gains(term, dims, shape)
        sizes = dict(zip(map(places.get, dims), gain.shape, strict=True))
        return gain.reshape([sizes.get(d, 1) for d in range(ndim)])

    if x is not None and any(t.rate and key is not None for t, key in gained):
        more = [(emit.dropped(x, t, key), along(t) - 1) for t, key in gained]
        if tied == {True}:
            return run((x + sum(x_ * gain for x_, gain in more)).astype(x.dtype))
        return run(x) + sum(run(x_) * gain for x_, gain in more)
    gain: Any = math.prod(along(term) for term, _ in gained)
    return run((x * gain).astype(x.dtype)) if tied == {True} else run(x) * gain


def _gained(term: Term) -> bool:
    return term.factors is not None and term.factors.gain is not None
