"""Parts of a kernel: slices, blocks, layers of a stack, and a kernel made of shards.

Each factor that owns a sliced dimension is sliced; one that stays whole is untouched.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from lorax.interpret.rules.views import part, regrouped, viewed
from lorax.interpret.terms.tracked import Term, Tracked
from lorax.interpret.uses.equations import aval
from lorax.interpret.walker import Value, Values, Walker, known, rule


@rule("slice")
def slice_(walker: Walker, eqn: JaxprEqn, values: Values) -> Values | None:
    """A static slice along any axes; a block outside it loses its term."""
    tracked, params = known(values[0]), eqn.params
    shape = tracked.value.shape
    strides = params["strides"] or (1,) * len(shape)
    for dim, stride in enumerate(strides):
        if stride != 1 and not all(term.whole(dim, shape) for term in tracked.terms):
            return None
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    terms = tracked.terms
    for dim, bound in enumerate(bounds):
        terms = _cut(terms, dim, bound)
    return [part(result, terms) for result in walker.view(eqn, values)]


def _cut(
    terms: Sequence[Term], dim: int, bound: tuple[int, int, int]
) -> tuple[Term, ...]:
    """Cuts one dimension of the view to `range(*bound)`; returns what is left."""
    low, high, stride = bound
    put = lambda t, x: t[:dim] + (x,) + t[dim + 1 :]
    kept = []
    for term in terms:
        begin = max(low - term.start[dim], 0)
        end = min(high - term.start[dim], term.shape[dim])
        size = len(range(begin, end, stride))
        start = put(term.start, max(term.start[dim] - low, 0))
        if size == term.shape[dim]:  # it is whole: no factor changes
            kept.append(dataclasses.replace(term, start=start))
        elif size:
            cut = functools.partial(_slice_in, begin=begin, end=end, stride=stride)
            shape = put(term.shape, size)
            kept.append(term.edit(dim, cut, start=start, shape=shape))
    return tuple(kept)


def _slice_in(
    factor: jax.Array, axis: int, begin: int, end: int, stride: int
) -> jax.Array:
    return jax.lax.slice_in_dim(factor, begin, end, stride, axis)


def _dynamic_slice_in(
    factor: jax.Array, axis: int, begin: jax.Array, size: int
) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(factor, begin, size, axis)


@rule("split", "unstack")
def split(walker: Walker, eqn: JaxprEqn, values: Values) -> Values:
    """Several slices along one axis at once; `unstack` also drops the axis."""
    tracked, axis = known(values[0]), eqn.params["axis"]
    shape = tuple(tracked.value.shape)
    results = walker.view(eqn, values)
    others = [d for d in range(len(shape)) if d != axis]
    groups = [([d], [j]) for j, d in enumerate(others)]
    outs: list[Value] = []
    offset = 0
    for result in results:
        stacked = result.ndim < len(shape)
        size = 1 if stacked else result.shape[axis]
        bound = (offset, offset := offset + size, 1)
        terms = _cut(tracked.terms, axis, bound)
        if stacked:
            old = (*shape[:axis], 1, *shape[axis + 1 :])
            lies = Tracked(result, ()).lies
            kept = (
                regrouped(term, groups, old=old, shape=result.shape, lies=lies)
                for term in terms
            )
            terms = tuple(term for term in kept if term is not None)
        outs.append(part(result, terms))
    return outs


@rule("dynamic_slice")
def dynamic_slice(walker: Walker, eqn: JaxprEqn, values: Values) -> Values | None:
    """A slice at traced indices: the layer of a stack, a chunk of an axis."""
    tracked, indices = values[0], [walker.merged(v, eqn) for v in values[1:]]
    if not isinstance(tracked, Tracked):
        return None
    sizes, shape = eqn.params["slice_sizes"], tracked.value.shape

    def edit(term: Term) -> Term | None:
        for dim, size in enumerate(sizes):
            if size == shape[dim]:
                continue
            if not term.whole(dim, shape):
                return None
            # the primitive clamps; a negative index does not count from the end
            begin = jnp.clip(indices[dim], 0, shape[dim] - size)
            term = term.edit(
                dim,
                functools.partial(_dynamic_slice_in, begin=begin, size=size),
                shape=term.shape[:dim] + (size,) + term.shape[dim + 1 :],
            )
        return term

    return viewed(walker, eqn, values, edit)


@rule("all_gather")
def all_gather(walker: Walker, eqn: JaxprEqn, values: Values) -> Values | None:
    """A kernel gathered from its shards: the factor that owns the axis is gathered."""
    if not eqn.params["tiled"]:
        return None
    dim, shape = eqn.params["all_gather_dimension"], known(values[0]).value.shape
    full = aval(eqn.outvars[0]).shape[dim]

    def gather(factor: jax.Array, axis: int) -> jax.Array:
        moved = eqn.replace(params=eqn.params | {"all_gather_dimension": axis})
        return walker.bind(moved, [factor])[0]

    def edit(term: Term) -> Term | None:
        if not term.whole(dim, shape):
            return None
        return term.edit(
            dim, gather, shape=term.shape[:dim] + (full,) + term.shape[dim + 1 :]
        )

    return viewed(walker, eqn, values, edit)
