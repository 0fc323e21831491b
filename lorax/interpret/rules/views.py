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

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from lorax import _explicit
from lorax.interpret.terms import maps
from lorax.interpret.terms.coded import Coded
from lorax.interpret.terms.tracked import Term, Tracked
from lorax.interpret.uses.equations import aval
from lorax.interpret.walker import Value, Values, Walker, known, rule
from lorax.types import Factors

Edit = Callable[[Term], Term | None]
Group = tuple[list[int], list[int]]
"""Dimensions before and after a reshape that hold the same numbers."""


def viewed(
    walker: Walker, eqn: JaxprEqn, values: Values, edit: Edit, operand: int = 0
) -> Values | None:
    """Runs a one-result equation and edits every term of the tracked operand."""
    tracked = values[operand]
    if not isinstance(tracked, Tracked):
        return None
    edited = [edit(term) for term in tracked.terms]
    terms = tuple(term for term in edited if term is not None)
    if len(terms) < len(edited):
        return None
    others = [walker.merged(v, eqn) if v is not tracked else v for v in values]
    return [Tracked(walker.view(eqn, others)[0], terms)]


def part(result: jax.Array | Coded, terms: Sequence[Term]) -> Value:
    """A view, or a plain array if no terms are left."""
    if isinstance(result, Coded) or terms:
        return Tracked(result, tuple(terms))
    return result


@rule("copy", "copy_p", "name", "sharding_constraint", "layout_constraint", "reshard")
def same(walker: Walker, eqn: JaxprEqn, values: Values) -> Values | None:
    """Operations that change neither the values nor the shape; factors follow them."""
    return viewed(walker, eqn, values, lambda term: term)


@rule("convert_element_type")
def convert(walker: Walker, eqn: JaxprEqn, values: Values) -> Values | None:
    """A cast to another floating dtype; factors are cast where they are used."""
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        return None
    return viewed(walker, eqn, values, lambda term: term)


@rule("optimization_barrier", "device_put")
def barrier(walker: Walker, eqn: JaxprEqn, values: Values) -> Values:
    """Operations over several operands, some of them kernels."""
    if any(isinstance(v, Tracked) and isinstance(v.value, Coded) for v in values):
        return values  # there is no array yet to hold back or to move
    results = walker.frozen(eqn, values)
    return [
        Tracked(result, value.terms) if isinstance(value, Tracked) else result
        for value, result in zip(values, results, strict=True)
    ]


@rule("stop_gradient", "pvary", "pcast")
def per_factor(walker: Walker, eqn: JaxprEqn, values: Values) -> Values | None:
    """Operations of any shape that act on the factors as on the kernel."""

    def edit(term: Term) -> Term:
        if term.factors is None:
            return term
        factors = jax.tree.map(lambda f: walker.bind(eqn, [f])[0], term.factors)
        return dataclasses.replace(term, factors=factors)

    return viewed(walker, eqn, values, edit)


@rule("transpose")
def transpose(walker: Walker, eqn: JaxprEqn, values: Values) -> Values | None:
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

        def order(kind: str) -> list[int]:
            return [term.dims(kind).index(permutation[d]) for d in new.dims(kind)]

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
def reverse(walker: Walker, eqn: JaxprEqn, values: Values) -> Values | None:
    """A flip of some dimensions; the factors that own them are flipped."""
    shape = known(values[0]).value.shape

    def edit(term: Term) -> Term:
        for dim in eqn.params["dimensions"]:
            start = list(term.start)
            start[dim] = shape[dim] - start[dim] - term.shape[dim]
            term = term.edit(dim, lambda f, axis: jnp.flip(f, axis), start=tuple(start))
        return term

    return viewed(walker, eqn, values, edit)


@rule("reshape", "broadcast_in_dim", "squeeze")
def reshape(walker: Walker, eqn: JaxprEqn, values: Values) -> Values | None:
    """A change of shape in which no dimension mixes kinds, or a repetition."""
    tracked = values[0]
    shape = tuple(aval(eqn.outvars[0]).shape)
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
    lies = _explicit.lies(aval(eqn.outvars[0]))
    edit = functools.partial(regrouped, groups=groups, old=old, shape=shape, lies=lies)
    return viewed(walker, eqn, values, edit)


def _repeated(
    term: Term, places: Sequence[int], old: Sequence[int], shape: tuple[int, ...]
) -> Term | None:
    """A kernel repeated along new dimensions: a stack of equal kernels and factors."""
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


def regrouped(
    term: Term,
    groups: list[Group],
    *,
    old: tuple[int, ...],
    shape: tuple[int, ...],
    lies: _explicit.Entries,
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
    term: Term, new: Term, lies: _explicit.Entries, shape: tuple[int, ...]
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
    sized = lambda factor, dims: _explicit.reshape(
        factor, [size for size, _ in dims], [entry for _, entry in dims]
    )
    n = len(term.dims("batch"))
    own = lambda f: [(size, None) for size in f.shape[n:]]  # of a map; whole on a mesh
    return Factors(
        sized(a, [*batch, *in_, *rank]),
        sized(b, [*batch, *rank, *out]),
        None if gain is None else sized(gain, [*batch, *out]),
        *jax.tree.map(lambda f: sized(f, [*batch, *own(f)]), held),
    )
