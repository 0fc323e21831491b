"""Kernels and embeddings taken by index.

    w[ids] of an embedding `[vocabulary, width]`     a[ids] @ b
    w[ids] of experts `[experts, in, out]`           x a[ids] b[ids]

Both are the same equation; what follows tells them apart. The result is a view of the
kernels if a dot contracts it with an activation and in and out axes are left, and a
lookup if it meets anything else. Under `discover` it stays undecided until then; under
`adapt` the adapter's axes have already decided.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import jax
from jax.extend.core import JaxprEqn

from lorax.interpret.terms.coded import Coded
from lorax.interpret.terms.tracked import Lookup, Term, Tracked
from lorax.interpret.uses.taken import Taken
from lorax.interpret.uses.use import Dims, Use
from lorax.interpret.walker import Values, Walker, rule


@rule("gather")
def gather(walker: Walker, eqn: JaxprEqn, values: Values) -> Values | None:
    """Slices at traced indices: kernels of a stack, or rows of an embedding."""
    view = values[0]
    if not isinstance(view, Tracked):
        return None
    taken = Taken.read(eqn, walker.merged(values[1], eqn))
    shape = view.value.shape
    if taken is None or not all(t.whole(taken.axis, shape) for t in view.terms):
        return None
    if _rows_of_a_table(view, taken.axis):
        return walker.frozen(eqn, values)
    if view.looked_up:  # taken from an earlier gather: still rows, or kernels
        known = [term.lookup for term in view.terms]
        return [_kernels(walker, view, taken, known)]
    kinds = {t.kind(taken.axis) for t in view.terms if t.factors is not None}
    if kinds == {"batch"} or all(t.added(taken.axis) for t in view.terms):
        return [_kernels(walker, view, taken)]
    use = _lookup(view, taken)
    if kinds:
        return walker.visitor.linear(walker, use)
    lookups, here = [], (*walker.scope, eqn)
    for term in view.terms:
        axes = use.axes(term)
        if axes is None:
            return None
        lookups.append(Lookup(axes, here, walker.line(eqn)))
    return [_kernels(walker, view, taken, lookups)]


def _rows_of_a_table(view: Tracked, axis: int) -> bool:
    """True for a lookup in a quantised embedding that has no adapter."""
    leaf = view.value.leaf if isinstance(view.value, Coded) else None
    return not view.terms and leaf is not None and axis not in leaf.axes.batch


def _kernels(
    walker: Walker,
    view: Tracked,
    taken: Taken,
    lookups: Sequence[Lookup | None] = (),
) -> Tracked:
    """The chosen kernels as a view: the indices number a stack of their own."""
    (value,) = walker.view(taken.eqn, [view, taken.indices])
    labels: list[tuple[int, ...]] = [()] * value.ndim
    terms = []
    for term, lookup in itertools.zip_longest(view.terms, lookups):
        start, shape = [0] * value.ndim, list(value.shape)
        for d, place_ in taken.window.items():
            if d != taken.axis:
                labels[place_] = term.labels[d]
                start[place_], shape[place_] = term.start[d], term.shape[d]
        new = dataclasses.replace(
            term,
            labels=tuple(labels),
            start=tuple(start),
            shape=tuple(shape),
            indexed=term.indexed | frozenset(term.labels[taken.axis]),
            lookup=lookup,
        )
        terms.append(_with_factors(term, new, taken))
    return Tracked(value, tuple(terms))


def _with_factors(term: Term, new: Term, taken: Taken) -> Term:
    """Takes the same kernels from every factor, laid out as in the new view."""
    if term.factors is None:
        return new
    old = term.dims("batch")
    axis = old.index(taken.axis)
    rows = [d for d in taken.rows if new.shape[d] > 1]
    names = [*rows, *(taken.window[d] for d in old if d != taken.axis)]
    order = [names.index(d) for d in new.dims("batch")]

    def take(factor: jax.Array) -> jax.Array:
        f = taken.of(factor, axis)
        f = jax.lax.squeeze(f, [i for i, d in enumerate(taken.rows) if d not in rows])
        return f.transpose(*order, *range(len(order), f.ndim))

    return dataclasses.replace(new, factors=jax.tree.map(take, term.factors))


def _lookup(view: Tracked, how: Taken) -> Use:
    """An embedding lookup as a linear use of the table."""
    written = {d: p for d, p in how.window.items() if d != how.axis}
    return Use(
        op="gather",
        eqn=how.eqn,
        view=view,
        operands=[view, how.indices],
        dims=Dims(read=(how.axis,), write=tuple(written)),
        flops=0,
        activation=None,  # an index: nothing to drop
        written=written,
        taken=how,
    )
