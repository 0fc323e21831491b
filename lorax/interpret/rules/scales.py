"""A kernel times a number or a vector: the factor that owns the axis is scaled.

(W0 + a b) * v[out] = W0 * v + a (b * v)      v[in] likewise, through a

A branch that is not a thin product is scaled only by numbers, one for each kernel of a
stack: c (W0 + C) = c W0 + c C.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from lorax import linalg
from lorax.interpret.rules.views import viewed
from lorax.interpret.terms.tracked import Term, Tracked
from lorax.interpret.uses.equations import aval
from lorax.interpret.walker import Value, Values, Walker, rule
from lorax.types import Factors, LinearMap

Change = Callable[[jax.Array, jax.Array], jax.Array]


@rule("neg")
def negate(walker: Walker, eqn: JaxprEqn, values: Values) -> Values | None:
    """-W."""
    return viewed(walker, eqn, values, negated)


def negated(term: Term) -> Term:
    """Returns the term of -W."""
    if term.factors is None:
        return term
    minus = _times(term, jnp.float32(-1))
    negative = term.factors._replace(b=-term.factors.b, branch=minus)
    return dataclasses.replace(term, factors=negative)


@rule("mul", "div")
def scale(walker: Walker, eqn: JaxprEqn, values: Values) -> Values | None:
    """A kernel times, or divided by, a scalar or a vector along some of its axes."""
    whole = aval(eqn.outvars[0]).shape
    kernels = [
        i
        for i, value in enumerate(values)
        if isinstance(value, Tracked) and whole and value.value.shape == whole
    ]
    if len(kernels) != 1 or (eqn.primitive.name == "div" and kernels == [1]):
        return None
    (operand,) = kernels
    atom = eqn.invars[1 - operand]
    # a scalar or a vector that is itself a leaf is not a kernel
    other = walker.merged(values[1 - operand], eqn)
    given: list[Value] = [other, other]
    given[operand] = values[operand]
    known = (walker.scalar(atom), walker.unbroadcast(atom), other)
    vector = jnp.asarray(next(array for array in known if array is not None))
    change = jnp.multiply if eqn.primitive.name == "mul" else jnp.divide
    return viewed(
        walker, eqn, given, lambda term: _scaled(term, vector, change), operand
    )


def _scaled(term: Term, vector: jax.Array, change: Change) -> Term | None:
    """Scales the factor that owns the dimensions along which the vector varies."""
    varied = [d for d, size in enumerate(vector.shape) if size > 1]
    if term.factors is None:
        return _noted(term, varied)
    a, b, gain, inputs, branch = term.factors
    kinds = {term.kind(d) for d in varied}
    if None in kinds or {"in", "out"} <= kinds:
        return None
    if kinds & {*term.factors.rigid}:
        return None
    for d in varied:
        low = term.start[d]
        vector = jax.lax.slice_in_dim(vector, low, low + term.shape[d], axis=d)
    branch = _times(term, change(jnp.ones((), linalg.wide(vector)), vector))
    batch, reads = term.dims("batch"), "in" in kinds
    own = term.dims("in" if reads else "out")
    if vector.ndim:
        rest = [d for d in range(vector.ndim) if d not in (*batch, *own)]
        vector = vector.transpose(*batch, *own, *rest)
        vector = jax.lax.squeeze(vector, range(vector.ndim - len(rest), vector.ndim))
        vector = jnp.expand_dims(vector, vector.ndim if reads else len(batch))
    if reads:
        a = change(a, vector.astype(a.dtype))
    else:
        b = change(b, vector.astype(b.dtype))
    return dataclasses.replace(term, factors=Factors(a, b, gain, inputs, branch))


def _times(term: Term, vector: jax.Array) -> LinearMap | None:
    """The term's branch times a number, or times one for each kernel of the stack."""
    assert term.factors is not None
    if term.factors.branch is None:
        return None
    stack = term.dims("batch")
    own = [vector.shape[d] if vector.ndim else 1 for d in stack]
    sizes = [term.shape[d] for d in stack]
    number = jnp.broadcast_to(vector.reshape(own), sizes)
    return LinearMap((number, term.factors.branch), _multiplied)


def _multiplied(both: tuple[jax.Array, LinearMap], x: jax.Array) -> jax.Array:
    """`c C(x)`."""
    number, held = both
    return number * held.apply(held.arrays, x)


def _noted(term: Term, varied: Sequence[int]) -> Term | None:
    """Under discover: notes the leaf's axes that must all be in, or all be out."""
    scaled = term.sized({axis for d in varied for axis in term.labels[d]})
    present = term.sized({axis for label in term.labels for axis in label})
    if len(scaled) < 2:
        return term
    if scaled == present:  # a mask over the whole kernel
        return None
    return dataclasses.replace(term, scaled=(*term.scaled, scaled))
