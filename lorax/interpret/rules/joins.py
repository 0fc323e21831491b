"""Several kernels in one view: joined, padded, stacked, added."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from lorax.interpret.rules.scales import negated
from lorax.interpret.rules.views import viewed
from lorax.interpret.terms.tracked import Term, Tracked
from lorax.interpret.uses.equations import aval
from lorax.interpret.walker import Value, Values, Walker, rule
from lorax.types import Factors


@rule("concatenate")
def concatenate(walker: Walker, eqn: JaxprEqn, values: Values) -> Values | None:
    """Kernels joined along an in or out axis (fused qkv), or along a new one."""
    dim = eqn.params["dimension"]
    views = [value for value in values if isinstance(value, Tracked)]
    terms = [term for view in views for term in view.terms]
    if any(not term.labels[dim] for term in terms):
        if all(aval(v).shape[dim] == 1 for v in eqn.invars):
            return _stacked(walker, eqn, values, dim)
        return None
    offset, joined = 0, []
    for value, atom in zip(values, eqn.invars, strict=True):
        for term in value.terms if isinstance(value, Tracked) else ():
            if term.factors is not None and term.kind(dim) not in ("in", "out"):
                return None
            joined.append(_moved(term, dim, offset))
        offset += aval(atom).shape[dim]
    return [Tracked(walker.view(eqn, values)[0], tuple(joined))]


def _moved(term: Term, dim: int, offset: int) -> Term:
    start = list(term.start)
    start[dim] += offset
    return dataclasses.replace(term, start=tuple(start))


@rule("pad")
def pad(walker: Walker, eqn: JaxprEqn, values: Values) -> Values | None:
    """A kernel within a border: its block moves inwards."""
    config = eqn.params["padding_config"]
    if any(min(low, high, inside) < 0 or inside for low, high, inside in config):
        return None

    def edit(term: Term) -> Term | None:
        for dim, (low, high, _) in enumerate(config):
            if (low or high) and (term.added(dim) or term.kind(dim) == "batch"):
                return None
            term = _moved(term, dim, low)
        return term

    return viewed(walker, eqn, values, edit)


@rule("stack")
def stack(walker: Walker, eqn: JaxprEqn, values: Values) -> Values:
    """Kernels stacked along a new axis: layers before a scan, q and k and v."""
    axis = eqn.params["axis"]
    put = lambda t, x: (*t[:axis], x, *t[axis:])

    def expanded(value: Value) -> Value:
        if not isinstance(value, Tracked):
            return value
        terms = (
            dataclasses.replace(
                term,
                labels=put(term.labels, ()),
                start=put(term.start, 0),
                shape=put(term.shape, 1),
            )
            for term in value.terms
        )
        return Tracked(value.value, tuple(terms))

    return _stacked(walker, eqn, [*map(expanded, values)], axis)


def _stacked(walker: Walker, eqn: JaxprEqn, values: Values, axis: int) -> Values:
    """Stacks views that have a dimension of length one there.

    Similar kernels become one stack with one pair of factors, which a scan or an index
    takes apart; others keep a term each, in its own place along the axis.
    """
    result = walker.view(eqn, values)[0]
    fused = _fused(values, axis, result.shape)
    if fused is not None:
        return [Tracked(result, (fused,))]
    terms = [
        _moved(term, axis, i)
        for i, value in enumerate(values)
        if isinstance(value, Tracked)
        for term in value.terms
    ]
    return [Tracked(result, tuple(terms))]


def _fused(values: Values, axis: int, shape: Sequence[int]) -> Term | None:
    """One term for a stack of similar kernels; None if they differ."""
    groups = [value.terms if isinstance(value, Tracked) else () for value in values]
    terms = [term for group in groups for term in group]
    if len(values) < 2 or not terms or any(len(group) > 1 for group in groups):
        return None
    first = terms[0]
    alike = lambda t: dataclasses.replace(t, path="", peers=(), factors=None)
    if any(alike(term) != alike(first) for term in terms):
        return None
    if not all(first.whole(d, shape) for d in range(len(shape)) if d != axis):
        return None
    paths = dict.fromkeys(p for term in terms for p in (term.path, *term.peers))
    path, *peers = paths
    whole = (*first.shape[:axis], len(values), *first.shape[axis + 1 :])
    new = dataclasses.replace(first, path=path, peers=tuple(peers), shape=whole)
    if first.factors is None:
        return new
    if any(term.factors is not None and term.factors.maps for term in terms):
        return None
    found = [group[0].factors if group else None for group in groups]
    return dataclasses.replace(new, factors=_fused_factors(found, new, axis))


def _fused_factors(found: Sequence[Factors | None], new: Term, axis: int) -> Factors:
    """Stacks factors along a batch axis: ranks padded by zeros, zero for no adapter."""
    place = new.dims("batch").index(axis)
    n = len(new.dims("batch")) - 1  # of each kernel, whose rank is axis n of b
    known = [factors for factors in found if factors is not None]
    rank = max(factors.a.shape[-1] for factors in known)

    def widened(factor: jax.Array, at: int) -> jax.Array:
        width = [(0, 0)] * factor.ndim
        width[at] = (0, rank - factor.shape[at])
        return jnp.pad(factor, width)

    a = [None if f is None else widened(f.a, f.a.ndim - 1) for f in found]
    b = [None if f is None else widened(f.b, n) for f in found]
    gain = [None if f is None else f.gain for f in found]
    like = next((g for g in gain if g is not None), None)
    return Factors(
        _filled(a, widened(known[0].a, known[0].a.ndim - 1), 0.0, place),
        _filled(b, widened(known[0].b, n), 0.0, place),
        None if like is None else _filled(gain, like, 1.0, place),
    )


def _filled(
    arrays: Sequence[jax.Array | None], like: jax.Array, fill: float, place: int
) -> jax.Array:
    """Stacks arrays, with a constant where there is none."""
    rest = jnp.full(like.shape, fill, like.dtype)
    return jnp.stack([rest if array is None else array for array in arrays], place)


@rule("sub")
def subtract(walker: Walker, eqn: JaxprEqn, values: Values) -> Values | None:
    """A kernel minus another."""
    return total(walker, eqn, values)


def total(walker: Walker, eqn: JaxprEqn, values: Values) -> Values | None:
    """The sum or difference of two kernels: the terms of both.

    Under `adapt` one of them may be any array of the same shape: `discover` has seen
    that the other is a kernel. A gain would multiply both, so such kernels are merged.
    """
    whole = aval(eqn.outvars[0]).shape
    if any(aval(v).shape != whole for v in eqn.invars):
        return None
    views = [value for value in values if isinstance(value, Tracked)]
    terms = [term for view in views for term in view.terms]
    frozen = all(term.factors is None for term in terms)
    if any(view.looked_up for view in views) or (len(views) < 2 and frozen):
        return None
    if any(t.factors is not None and not t.factors.adds for t in terms):
        return None
    if any(walker.scalar(atom) is not None for atom in eqn.invars):
        return None
    if eqn.primitive.name == "sub" and isinstance(values[1], Tracked):
        second = Tracked(values[1].value, tuple(map(negated, values[1].terms)))
        values = [values[0], second]
    parts = [v.terms if isinstance(v, Tracked) else () for v in values]
    return [Tracked(walker.view(eqn, values)[0], (*parts[0], *parts[1]))]
