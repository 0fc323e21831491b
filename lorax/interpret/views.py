"""Views of a kernel: operations after which it is still a kernel.

Each rule runs the equation on the frozen array and makes the same edit to the labels
and factors of every term. A rule returns None where the result would no longer be low
rank in the same factors (in and out axes flattened together, say).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lorax import _explicit
from lorax.interpret import maps
from lorax.interpret.tracked import Term, Tracked
from lorax.interpret.walker import Walker, rule
from lorax.types import Factors

Edit = Callable[[Term], Term | None]
Group = tuple[list[int], list[int]]
"""Dimensions before and after a reshape that hold the same numbers."""


def viewed(
    walker: Walker, eqn: Any, values: Sequence[Any], edit: Edit, operand: int = 0
) -> list[Tracked] | None:
    """Runs a one-result equation and edits every term of the tracked operand."""
    tracked = values[operand]
    if not isinstance(tracked, Tracked):
        return None
    edited = [edit(term) for term in tracked.terms]
    terms = tuple(term for term in edited if term is not None)
    if len(terms) < len(edited):
        return None
    values = [v.value if v is tracked else walker.merged(v, eqn) for v in values]
    return [Tracked(walker.bind(eqn, values)[0], terms)]


@rule("copy", "copy_p", "name", "sharding_constraint", "layout_constraint", "reshard")
def same(walker: Walker, eqn: Any, values: list[Any]) -> list[Tracked] | None:
    """Operations that change neither the values nor the shape; factors follow them."""
    return viewed(walker, eqn, values, lambda term: term)


@rule("convert_element_type")
def convert(walker: Walker, eqn: Any, values: list[Any]) -> list[Tracked] | None:
    """A cast to another floating dtype; factors are cast where they are used."""
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        return None
    return viewed(walker, eqn, values, lambda term: term)


@rule("optimization_barrier", "device_put")
def barrier(walker: Walker, eqn: Any, values: list[Any]) -> list[Any]:
    """Operations over several operands, some of them kernels."""
    plain = [v.value if isinstance(v, Tracked) else v for v in values]
    results = walker.bind(eqn, plain)
    return [
        Tracked(result, value.terms) if isinstance(value, Tracked) else result
        for value, result in zip(values, results, strict=True)
    ]


@rule("stop_gradient", "pvary", "pcast")
def per_factor(walker: Walker, eqn: Any, values: list[Any]) -> list[Tracked] | None:
    """Operations of any shape that act on the factors as on the kernel."""

    def edit(term: Term) -> Term:
        if term.factors is None:
            return term
        factors = jax.tree.map(lambda f: walker.bind(eqn, [f])[0], term.factors)
        return dataclasses.replace(term, factors=factors)

    return viewed(walker, eqn, values, edit)


@rule("transpose")
def transpose(walker: Walker, eqn: Any, values: list[Any]) -> list[Tracked] | None:
    """A permutation of the view's dimensions; factors keep view order."""
    permutation = eqn.params["permutation"]
    pick = lambda t: tuple(t[d] for d in permutation)

    def edit(term: Term) -> Term:
        new = dataclasses.replace(
            term,
            labels=pick(term.labels),
            start=pick(term.start),
            shape=pick(term.shape),
        )
        if term.factors is None:
            return new
        order = lambda kind: [
            term.dims(kind).index(permutation[d]) for d in new.dims(kind)
        ]
        batch, in_, out = order("batch"), order("in"), order("out")
        n = len(batch)
        a = term.factors.a.transpose(*batch, *(n + i for i in in_), n + len(in_))
        b = term.factors.b.transpose(*batch, n, *(n + 1 + i for i in out))
        _, _, gain, *held = term.factors
        if gain is not None:
            gain = gain.transpose(*batch, *(n + i for i in out))
        held = jax.tree.map(lambda f: f.transpose(*batch, *range(n, f.ndim)), held)
        return dataclasses.replace(new, factors=Factors(a, b, gain, *held))

    return viewed(walker, eqn, values, edit)


@rule("rev")
def reverse(walker: Walker, eqn: Any, values: list[Any]) -> list[Tracked] | None:
    """A flip of some dimensions; the factors that own them are flipped."""
    shape = values[0].value.shape

    def edit(term: Term) -> Term:
        for dim in eqn.params["dimensions"]:
            start = list(term.start)
            start[dim] = shape[dim] - start[dim] - term.shape[dim]
            term = term.edit(dim, lambda f, axis: jnp.flip(f, axis), start=tuple(start))
        return term

    return viewed(walker, eqn, values, edit)


@rule("reshape", "broadcast_in_dim", "squeeze")
def reshape(walker: Walker, eqn: Any, values: list[Any]) -> list[Tracked] | None:
    """A change of shape in which no dimension mixes kinds, or a repetition."""
    tracked = values[0]
    shape = tuple(eqn.outvars[0].aval.shape)
    if eqn.params.get("dimensions") is not None and eqn.primitive.name == "reshape":
        return None
    size = math.prod(shape)
    if not isinstance(tracked, Tracked) or size == 0:
        return None
    old = tuple(tracked.value.shape)
    if size != tracked.value.size:
        places = eqn.params["broadcast_dimensions"]
        return viewed(walker, eqn, values, lambda t: _repeated(t, places, old, shape))
    if eqn.primitive.name == "squeeze":
        kept = [d for d in range(len(old)) if d not in eqn.params["dimensions"]]
        groups = [([d], [j]) for j, d in enumerate(kept)]
    elif eqn.primitive.name == "broadcast_in_dim":
        places = eqn.params["broadcast_dimensions"]
        groups = [([d], [j]) for d, j in enumerate(places)]
    else:
        groups = _groups(old, shape)
    lies = _explicit.lies(eqn.outvars[0].aval)
    edit = lambda term: _regroup(term, groups, old, shape, lies)
    return viewed(walker, eqn, values, edit)


def _repeated(
    term: Term, places: Sequence[int], old: Sequence[int], shape: tuple[int, ...]
) -> Term | None:
    """A kernel repeated along new dimensions: a stack of equals, factors as well."""
    labels: list[tuple[int, ...]] = [()] * len(shape)
    start, block = [0] * len(shape), list(shape)
    for d, j in enumerate(places):
        if old[d] == shape[j]:
            labels[j], start[j], block[j] = term.labels[d], term.start[d], term.shape[d]
        elif term.labels[d]:
            return None
    new = dataclasses.replace(
        term, labels=tuple(labels), start=tuple(start), shape=tuple(block)
    )
    if term.factors is None:
        return new
    kept = {places[d]: i for i, d in enumerate(term.dims("batch"))}
    stack = new.dims("batch")

    def repeat(factor: jax.Array) -> jax.Array:
        own = factor.shape[len(kept) :]
        added = [i for i, d in enumerate(stack) if d not in kept]
        whole = [new.shape[d] for d in stack]
        return jnp.broadcast_to(jnp.expand_dims(factor, added), (*whole, *own))

    return dataclasses.replace(new, factors=jax.tree.map(repeat, term.factors))


def _groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[Group]:
    """Splits a reshape into the smallest groups of dimensions of equal product."""
    olds = [d for d, size in enumerate(old) if size != 1]
    news = [d for d, size in enumerate(new) if size != 1]
    groups = []
    while olds:
        left, right = [olds.pop(0)], [news.pop(0)]
        size = lambda dims, shape: math.prod(shape[d] for d in dims)
        while size(left, old) != size(right, new):
            if size(left, old) < size(right, new):
                left.append(olds.pop(0))
            else:
                right.append(news.pop(0))
        groups.append((left, right))
    return groups


def _regroup(
    term: Term,
    groups: list[Group],
    old: tuple[int, ...],
    shape: tuple[int, ...],
    lies: Sequence[Any],
) -> Term | None:
    """Relabels a term after a reshape and gives its factors the new sizes.

    `lies` says how each dimension of the result is sharded.
    """
    new = _relabelled(term, groups, old, shape)
    if new is None or term.factors is None:
        return new
    if any(new.kind(d) is None for d in range(len(shape))):
        return None
    if term.factors.maps and not maps.follows(term, groups):
        return None
    return dataclasses.replace(new, factors=_resized(term, new, lies, shape))


def _relabelled(
    term: Term, groups: list[Group], old: tuple[int, ...], shape: tuple[int, ...]
) -> Term | None:
    """The term's place in a view after a reshape; None where a group is mixed."""
    labels: list[tuple[int, ...]] = [()] * len(shape)
    start, block = [0] * len(shape), list(shape)
    for left, right in groups:
        own = {bool(term.labels[d]) for d in left if term.shape[d] > 1}
        if len(own) > 1:  # an axis of the leaf and one that the program added
            return None
        label = tuple(dict.fromkeys(axis for d in left for axis in term.labels[d]))
        for d in right:
            labels[d] = label
        if len(left) == len(right) == 1:
            start[right[0]], block[right[0]] = term.start[left[0]], term.shape[left[0]]
        elif not all(term.whole(d, old) for d in left):
            return None
    if math.prod(block) != math.prod(term.shape):
        return None
    gone = {axis for label in term.labels for axis in label}
    gone -= {axis for label in labels for axis in label}
    return dataclasses.replace(
        term,
        labels=tuple(labels),
        start=tuple(start),
        shape=tuple(block),
        indexed=term.indexed | term.sized(tuple(gone)),
    )


def _resized(
    term: Term, new: Term, lies: Sequence[Any], shape: tuple[int, ...]
) -> Factors:
    """The factors of a term with the sizes of the view that it has become."""
    assert term.factors is not None
    block = new.shape
    batch, in_, out = (
        [(block[d], lies[d] if block[d] == shape[d] else None) for d in new.dims(kind)]
        for kind in ("batch", "in", "out")
    )
    a, b, gain, *held = term.factors
    rank = [(a.shape[-1], None)]
    sized = lambda factor, dims: _explicit.reshape(factor, *zip(*dims, strict=True))
    return Factors(
        sized(a, [*batch, *in_, *rank]),
        sized(b, [*batch, *rank, *out]),
        None if gain is None else sized(gain, [*batch, *out]),
        *jax.tree.map(
            lambda f: sized(f, [*batch, *_own(f, len(term.dims("batch")))]), held
        ),
    )


def _own(factor: jax.Array, n: int) -> list[tuple[int, Any]]:
    """The sizes of a map's own axes, behind n of the stack; whole on a mesh."""
    return [(size, None) for size in factor.shape[n:]]


@rule("slice")
def slice_(walker: Walker, eqn: Any, values: list[Any]) -> list[Any] | None:
    """A static slice along any axes; a block outside it loses its term."""
    tracked, params = values[0], eqn.params
    shape = tracked.value.shape
    strides = params["strides"] or (1,) * len(shape)
    for dim, stride in enumerate(strides):
        if stride != 1 and not all(term.whole(dim, shape) for term in tracked.terms):
            return None
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    terms = tracked.terms
    for dim, bound in enumerate(bounds):
        terms = _cut(terms, dim, bound)
    result = walker.bind(eqn, [tracked.value])[0]
    return [Tracked(result, terms) if terms else result]


def _cut(
    terms: Sequence[Term], dim: int, bound: tuple[int, int, int]
) -> tuple[Term, ...]:
    """Cuts one dimension of the view to `range(*bound)`; what is left of each term."""
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
def split(walker: Walker, eqn: Any, values: list[Any]) -> list[Any]:
    """Several slices along one axis at once; `unstack` also drops the axis."""
    tracked, axis = values[0], eqn.params["axis"]
    shape = tuple(tracked.value.shape)
    results = walker.bind(eqn, [tracked.value])
    kept = [d for d in range(len(shape)) if d != axis]
    groups = [([d], [j]) for j, d in enumerate(kept)]
    outs, offset = [], 0
    for result in results:
        stacked = result.ndim < len(shape)
        size = 1 if stacked else result.shape[axis]
        bound = (offset, offset := offset + size, 1)
        terms = _cut(tracked.terms, axis, bound)
        if stacked:
            old = (*shape[:axis], 1, *shape[axis + 1 :])
            lies = _explicit.entries(result)
            regrouped = (
                _regroup(term, groups, old, result.shape, lies) for term in terms
            )
            terms = tuple(term for term in regrouped if term is not None)
        outs.append(Tracked(result, terms) if terms else result)
    return outs


@rule("dynamic_slice")
def dynamic_slice(walker: Walker, eqn: Any, values: list[Any]) -> list[Tracked] | None:
    """A slice at traced indices: the layer of a stack, a chunk of an axis."""
    tracked, *indices = values
    if not isinstance(tracked, Tracked):
        return None
    sizes, shape = eqn.params["slice_sizes"], tracked.value.shape

    def edit(term: Term) -> Term | None:
        for dim, size in enumerate(sizes):
            if size == shape[dim]:
                continue
            if not term.whole(dim, shape):
                return None
            # the primitive clamps, and its index is not to be read as from the end
            begin = jnp.clip(indices[dim], 0, shape[dim] - size)
            term = term.edit(
                dim,
                functools.partial(_dynamic_slice_in, begin=begin, size=size),
                shape=term.shape[:dim] + (size,) + term.shape[dim + 1 :],
            )
        return term

    return viewed(walker, eqn, values, edit)


@rule("all_gather")
def all_gather(walker: Walker, eqn: Any, values: list[Any]) -> list[Tracked] | None:
    """A kernel gathered from its shards: the factor that owns the axis is gathered."""
    if not eqn.params["tiled"]:
        return None
    dim, shape = eqn.params["all_gather_dimension"], values[0].value.shape
    full = eqn.outvars[0].aval.shape[dim]

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
