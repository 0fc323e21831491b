"""Kernels and embeddings taken by index.

    w[ids] of an embedding `[vocabulary, width]`     a[ids] @ b
    w[ids] of experts `[experts, in, out]`           x a[ids] b[ids]

Both are the same equation; what follows tells them apart. The result is a view of the
kernels where a dot contracts it with an activation and in and out axes are left, and a
lookup where it meets anything else. Under discover it stays undecided until then; under
`adapt` the adapter's axes have decided.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorax import _explicit
from lorax.interpret import emit
from lorax.interpret.linear import Pair, Use
from lorax.interpret.tracked import Lookup, Term, Tracked, place
from lorax.interpret.walker import Walker, rule


class Taken(NamedTuple):
    """A gather of whole slices along one axis.

    Attributes:
      axis: of the operand, which the indices number.
      ids: `[*shape, 1]`, the indices along it.
      window: for each dimension of the operand that the result has, where.
      rows: the dimensions of the result that number the indices.
      params: of the equation, for gathers of the factors.
    """

    axis: int
    ids: jax.Array
    window: dict[int, int]
    rows: tuple[int, ...]
    params: dict[str, Any]

    def of(self, factor: jax.Array, axis: int) -> jax.Array:
        """Returns `[*rows, *other axes]` of a factor that has the axis at `axis`."""
        rows = self.ids.ndim - 1
        numbers = jax.lax.GatherDimensionNumbers(
            offset_dims=tuple(range(rows, rows + factor.ndim - 1)),
            collapsed_slice_dims=(axis,),
            start_index_map=(axis,),
        )
        sizes = [1 if d == axis else size for d, size in enumerate(factor.shape)]
        return jax.lax.gather(
            factor,
            self.ids,
            numbers,
            slice_sizes=sizes,
            indices_are_sorted=self.params["indices_are_sorted"],
            unique_indices=self.params["unique_indices"],
            mode=self.params["mode"],
            fill_value=0,
        )


def _taken(eqn: Any, indices: jax.Array) -> Taken | None:
    """Reads a gather, or a dynamic_slice under vmap, as `w[:, ids]`; None otherwise."""
    params = eqn.params
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    shape = eqn.invars[0].aval.shape
    mapped = tuple(numbers.start_index_map)
    partial = [d for d, size in enumerate(shape) if sizes[d] != size]
    axes = partial or [d for d in mapped if sizes[d] == 1]
    if len(axes) != 1 or sizes[axes[0]] != 1 or axes[0] not in mapped:
        return None
    collapsed = set(numbers.collapsed_slice_dims)
    if numbers.operand_batching_dims or not collapsed <= {*axes}:
        return None
    fills = params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP
    if len(mapped) > 1 and fills:  # of another axis an index beyond zero would fill
        return None
    at = mapped.index(axes[0])
    kept = [d for d in range(len(shape)) if d not in collapsed]
    window = dict(zip(kept, numbers.offset_dims, strict=True))
    out = range(len(eqn.outvars[0].aval.shape))
    rows = tuple(d for d in out if d not in numbers.offset_dims)
    return Taken(axes[0], indices[..., at : at + 1], window, rows, params)


@rule("gather")
def gather(walker: Walker, eqn: Any, values: list[Any]) -> list[Any] | None:
    """Slices at traced indices: kernels of a stack, or rows of an embedding."""
    view, indices = values
    if not isinstance(view, Tracked):
        return None
    taken = _taken(eqn, indices)
    shape = view.value.shape
    if taken is None or not all(t.whole(taken.axis, shape) for t in view.terms):
        return None
    if view.looked_up:  # of what was chosen before: still rows, or kernels
        known = [term.lookup for term in view.terms]
        return [_kernels(walker, eqn, view, indices, taken, known)]
    kinds = {t.kind(taken.axis) for t in view.terms if t.factors is not None}
    if kinds == {"batch"} or all(t.added(taken.axis) for t in view.terms):
        return [_kernels(walker, eqn, view, indices, taken)]
    use = _lookup(eqn, values, taken)
    if kinds:
        return walker.visitor.linear(walker, eqn, use, _branch(eqn, taken, use))
    lookups, here = [], (*walker.scope, id(eqn))
    for term in view.terms:
        axes = use.axes(term)
        if axes is None:
            return None
        lookups.append(Lookup(axes, here, walker.line(eqn)))
    return [_kernels(walker, eqn, view, indices, taken, lookups)]


def _kernels(
    walker: Walker,
    eqn: Any,
    view: Tracked,
    indices: jax.Array,
    taken: Taken,
    lookups: Sequence[Lookup | None] = (),
) -> Tracked:
    """The chosen kernels as a view: the indices number a stack of their own."""
    value = walker.bind(eqn, [view.value, indices])[0]
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
    """Takes the same kernels of every factor, laid out as the new view has them."""
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


def _lookup(eqn: Any, values: list[Any], taken: Taken) -> Use:
    """An embedding lookup as a linear use of the table."""
    written = {d: p for d, p in taken.window.items() if d != taken.axis}
    return Use(
        "gather",
        values[0],
        values,
        (taken.axis,),
        tuple(written),
        (),
        0,
        activation=None,  # an index: nothing to drop
        written=written,
    )


def _branch(eqn: Any, taken: Taken, use: Use) -> Any:
    """Rows of `a` are looked up, then multiplied by `b`."""
    out = eqn.outvars[0].aval
    skipped = taken.window.get(taken.axis)  # of length one, where it is not collapsed

    def branch(term: Term, pair: Pair, x: Any) -> jax.Array:
        del x
        rows = taken.of(pair.first, 0)  # [*ids, rank] of [vocabulary, rank]
        ids = rows.ndim - 1
        places, shape = list(use.written.values()), use.view.value.shape
        of = _explicit.lies(out)
        lies = [of[d] for d in taken.rows]
        lies += [
            of[p] if term.whole(d, shape) else None for d, p in use.written.items()
        ]
        z = emit.mix(rows, pair.second, ids, (), None, out.dtype, lies)
        if skipped is not None:
            z, places = z[..., None], [*places, skipped]
        z = jnp.moveaxis(z, range(ids, z.ndim), places)
        start = [0] * z.ndim
        for dim, place_ in use.written.items():
            start[place_] = term.start[dim]
        return place(z, start, out.shape)

    return branch
