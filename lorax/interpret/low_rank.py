"""The result of a linear use under `adapt`: the frozen product and the thin branches.

    y = x @ W + (x @ a) @ b            (scale is folded into b)

with the activation as the left operand of every product, the factors cast to the
kernel's dtype, and the sum taken in at least float32 before one cast. A term with a
gain on its outputs multiplies `x @ W` by it, or x where the use is transposed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from lorax import _explicit, linalg
from lorax.interpret.terms.coded import Coded, reading
from lorax.interpret.terms.dense import block_of, dense, gains, ungained
from lorax.interpret.terms.tracked import Term, Tracked
from lorax.interpret.uses import branches, integer, mapped, rescale, thin
from lorax.interpret.uses.pairs import Pair, oriented
from lorax.interpret.uses.rescale import Pending
from lorax.interpret.uses.use import Use
from lorax.interpret.walker import Walker


class Inputs(NamedTuple):
    """What the frozen product and the branches read; all None for a lookup.

    Attributes:
      frozen: the input of the frozen product.
      thin: for each term, the input of its branch, after dropout.
      dropped: True if dropout acts on one of them.
    """

    frozen: jax.Array | None
    thin: Sequence[jax.Array | None]
    dropped: bool


def low_rank(walker: Walker, use: Use) -> list[jax.Array | Pending] | None:
    """Returns the operation's result plus the branch of every term, or None.

    The sum is left `Pending` where an addition follows.
    """
    terms, gained = use.view.terms, any(term.gained for term in use.view.terms)
    dtype = use.out.dtype
    if gained and dtype == jnp.float16:
        dtype = jnp.dtype(jnp.float32)  # a gradient times a small gain would vanish
    pairs = oriented(use, dtype)
    if pairs is None:
        return None
    if not terms:  # a quantised kernel without an adapter
        return [_frozen(walker, use, use.input)]
    inputs = dropout(walker, use)
    gain, rest = None, None
    if gained:
        gain = gain_of(use, pairs)
        if gain is None or (len(terms) > 1 and inputs.dropped):
            return None
        if pairs[0].tied:
            inputs, gain = tie(inputs, gain), None
        elif inputs.dropped:
            if walker.scaled_behind(use.eqn):
                return None
            inputs, rest = spared(walker, use, inputs)
    if rest is not None and any(term.turns for term in terms):
        return None
    base = product(walker, use, inputs.frozen, pairs[0].tied)
    added = []
    for term, pair, x in zip(terms, pairs, inputs.thin, strict=True):
        found = branches.parts(use, term, pair, x=x, base=base)
        added += [_explicit.like(part, base) for part in found]
    if not added and gain is None:
        return [base]
    wide = linalg.wide(use.out.dtype)
    extra = sum(added[1:], start=added[0]) if added else jnp.zeros((), wide)
    plain = gain is not None and not walker.scaled_behind(use.eqn)
    again = _again(use, inputs.frozen) if plain else None
    return [summed(walker, use, Pending(base, extra, gain, again), rest)]


def dropout(walker: Walker, use: Use) -> Inputs:
    """Returns the inputs: as given for the frozen product, dropped for each branch."""
    x, terms = use.input, use.view.terms
    if x is None:
        return Inputs(None, [None] * len(terms), dropped=False)
    each = [thin.dropped(x, term, walker.fork_key()) for term in terms]
    return Inputs(x, each, walker.key is not None and any(t.rate for t in terms))


def gain_of(use: Use, pairs: Sequence[Pair]) -> jax.Array | None:
    """Returns a view's gains, laid out as the result or, if tied, as the activation.

    None where they do not factor out: the kernel holds only some of a term's inputs, or
    is used in both orientations at once.
    """
    shape = use.view.value.shape
    gained = [term for term in use.view.terms if term.gained]
    whole = all(t.whole(d, shape) for t in gained for d in t.dims("in"))
    tied = pairs[0].tied
    places = use.applied if tied else use.written
    if len({pair.tied for pair in pairs}) > 1 or not places or not whole:
        return None
    dims = sorted(places, key=places.__getitem__)
    needed = {d for t in gained for k in ("batch", "out") for d in t.dims(k)}
    if not needed <= set(dims):  # a gain per expert, but the use sums over experts
        return None
    like = use.input if tied else use.out
    assert like is not None

    def along(term: Term) -> jax.Array:
        gain = gains(term, dims, shape)
        assert gain is not None
        if use.groups is not None:  # [groups, write]: the group differs from row to row
            rows = like.shape[0]
            return jnp.repeat(gain, use.groups, axis=0, total_repeat_length=rows)
        sizes = dict(zip(map(places.get, dims), gain.shape, strict=True))
        return gain.reshape([sizes.get(d, 1) for d in range(len(like.shape))])

    return cast(jax.Array, math.prod(map(along, gained)))


def tie(inputs: Inputs, gain: jax.Array) -> Inputs:
    """Returns the inputs of a transposed use: `(W * gain)^T` reads `x * gain`."""
    x, each, dropped = inputs
    assert x is not None
    gain = _explicit.like(gain, x)
    wide = linalg.wide(x, gain)
    times = lambda x, gain: x.astype(wide) * gain.astype(wide)
    base = times(x, gain)
    if dropped:
        base = x.astype(wide) + times(each[0], gain - 1)
    each = [times(own, gain).astype(x.dtype) for own in each]
    return Inputs(base.astype(x.dtype), each, dropped)


def spared(walker: Walker, use: Use, inputs: Inputs) -> tuple[Inputs, jax.Array]:
    """Returns the inputs of a rescaled product, and the product of what was dropped.

    What is dropped does not enter the rescaled part and keeps its magnitude.
    """
    x, (kept,) = inputs.frozen, inputs.thin
    assert x is not None and kept is not None
    rest = _frozen(walker, use, x - kept).astype(linalg.wide(use.out.dtype))
    return Inputs(kept, inputs.thin, inputs.dropped), rest


def product(walker: Walker, use: Use, x: jax.Array | None, tied: bool) -> jax.Array:
    """Returns the frozen product, of inputs turned by a term's map if there is one."""
    turn = next((term for term in use.view.terms if term.turns), None)
    if turn is None or x is None:
        return _frozen(walker, use, x)
    if (dim := mapped.outputs_in_parts(use)) is not None:
        return by_parts(use, x, dim)
    if tied:
        return mapped.turned_back(use, turn, _frozen(walker, use, x))
    return _frozen(walker, use, mapped.turned(use, turn, x))


def _frozen(walker: Walker, use: Use, x: jax.Array | None) -> jax.Array:
    """Returns the operation on the frozen kernel alone, with input x if it has one."""
    if (found := integer.dot(use, x)) is not None:
        return found
    return walker.frozen(use.eqn, use.given(x))[0]


def by_parts(use: Use, x: jax.Array, dim: int) -> jax.Array:
    """Returns the frozen product, each term's block of outputs from its own inputs.

    Args:
      use: of a kernel in parts.
      x: the inputs.
      dim: of the view, along which it is split.
    """
    turning = (term for term in use.view.terms if term.turns)
    found, at = [], 0
    for term in sorted(turning, key=lambda term: term.start[dim]):
        begin, end = term.start[dim], term.start[dim] + term.shape[dim]
        own = mapped.turned(use, term, x)
        found += [(x, at, begin), (own, begin, end)]
        at = end
    found.append((x, at, use.view.value.shape[dim]))
    parts = [_of_outputs(use, dim, *part) for part in found if part[1] < part[2]]
    return jnp.concatenate(parts, use.written[dim])


def _of_outputs(use: Use, dim: int, x: jax.Array, begin: int, end: int) -> jax.Array:
    """The frozen product of some outputs."""

    def run(kernel: jax.Array, x: jax.Array) -> jax.Array:
        w = jax.lax.slice_in_dim(kernel, begin, end, axis=dim)
        values = [w if isinstance(v, Tracked) else x for v in use.operands]
        return use.eqn.primitive.bind(*values, **use.eqn.params)

    return reading(run, [use.view.value, x])


def summed(
    walker: Walker, use: Use, parts: Pending, rest: jax.Array | None
) -> jax.Array | Pending:
    """Returns the sum of a result's parts, or the parts where an addition follows.

    Args:
      walker: of the use.
      use: the linear use.
      parts: of its result.
      rest: what is added after the gain.
    """
    if walker.scaled_behind(use.eqn):
        return parts
    spec = jax.typeof(parts.base).sharding.spec
    if parts.gain is not None and spec.unreduced:
        base, branch = _explicit.summed(parts.base), _explicit.summed(parts.branch)
        rest = None if rest is None else _explicit.summed(rest)
        whole = rescale.total(Pending(base, branch, parts.gain), rest)
        return _explicit.moved(whole, spec, parts.base)
    wide = linalg.wide(use.out.dtype)
    if wide == use.out.dtype and rest is None and walker.feeds_only_an_add(use.eqn):
        return parts
    return rescale.total(parts, rest)


def thin_only(walker: Walker, use: Use) -> jax.Array | None:
    """Returns the branches of all terms without the frozen product, or None."""
    terms, pairs = use.view.terms, oriented(use, use.out.dtype)
    if pairs is None or any(term.gained or term.turns for term in terms):
        return None
    found: list[jax.Array] = []
    inputs = dropout(walker, use)
    for term, pair, x in zip(terms, pairs, inputs.thin, strict=True):
        for part in branches.parts(use, term, pair, x=x, base=use.out):
            found.append(_explicit.like(part, found[0]) if found else part)
    return sum(found[1:], start=found[0])


def _again(use: Use, x: jax.Array | None) -> rescale.Again | None:
    """How some outputs of a use are computed again, from the merged kernel.

    None if its result is not made of blocks: for a lookup, grouped rows or a mesh.
    """
    view, eqn = use.view, use.eqn
    whole = lambda d: all(term.whole(d, view.value.shape) for term in view.terms)
    dims = [d for d in use.dims.write if d in use.written and whole(d)]
    plain = use.op in ("dot", "conv")
    maps = any(term.factors and term.factors.maps for term in view.terms)
    if x is None or not plain or not dims or maps:
        return None
    if isinstance(view.value, Coded):  # each block would decode the whole kernel
        return None
    if _explicit.is_explicit(view.value, x) or not thin.alone(view.value):
        return None
    dim = max(dims, key=lambda d: view.value.shape[d])
    rest = [x if i == use.activation else None for i, _ in enumerate(use.operands)]

    def run(
        operands: tuple[Tracked, *tuple[jax.Array | None, ...]],
        begin: jax.Array,
        size: int,
    ) -> jax.Array:
        view, *others = operands
        kernel = dense(block_of(view, dim, begin, size))
        values = [kernel if v is None else v for v in others]
        return eqn.primitive.bind(*values, **eqn.params)  # of another shape than eqn's

    return rescale.Again(run, (ungained(view), *rest), use.written[dim])
