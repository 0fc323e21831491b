"""The maps of whole inputs, which are not thin products, at a linear operation.

    y = (x + x D) @ W0 + C(x)

A transposed use applies the transposed maps, D to the result and C to the activation.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import jax
from jax.extend import core

from lorax import _explicit
from lorax.interpret.terms import maps
from lorax.interpret.terms.tracked import Term
from lorax.interpret.uses.equations import Typed
from lorax.interpret.uses.use import Use


def precisely(eqn: core.JaxprEqn) -> AbstractContextManager[None]:
    """A context in which maps compute as the equation does.

    The functions of maps name no precision: they use the equation's, if it has one.
    """
    given = eqn.params.get("precision")
    own = given[0] if isinstance(given, tuple) else given
    if not isinstance(own, jax.lax.Precision):
        return contextlib.nullcontext()
    return jax.default_matmul_precision(own.name.lower())


def acts(use: Use, term: Term, tied: bool) -> bool:
    """True if the maps of a term, if it has any, can act in this use."""
    if term.factors is None or not term.factors.maps:
        return True
    if use.op != "dot" or not term.turns:
        return use.op == "dot"
    if not _parted(use, term):
        return len(use.view.terms) == 1
    return not tied and outputs_in_parts(use) is not None


def outputs_in_parts(use: Use) -> int | None:
    """Returns the output dimension along which terms with a map of inputs are blocks.

    The product is split along it, because the parts of a fused kernel then read inputs
    of their own. None if there are no such blocks, or the product must not be split.
    """
    dims = {d for term in use.view.terms if term.turns for d in _parted(use, term)}
    if len(dims) != 1 or _explicit.is_explicit(use.view.value, use.input):
        return None
    return next((d for d in dims if d in use.dims.write), None)


def _parted(use: Use, term: Term) -> list[int]:
    """The dimensions of a view of which a term is only a block."""
    shape = use.view.value.shape
    return [d for d in range(len(shape)) if not term.whole(d, shape)]


def turned(use: Use, term: Term, x: jax.Array) -> jax.Array:
    """Returns `x + x D`, with D the term's map of inputs, rounded once."""
    assert term.factors is not None and term.factors.inputs is not None
    names = maps.named(term, use.applied, x.ndim, "in")
    ends = names, "in"
    own = term.factors.inputs
    change = maps.applied(own, term, x, given=ends, wanted=ends, like=x)
    return (x.astype(change.dtype) + change).astype(x.dtype)


def turned_back(use: Use, term: Term, y: jax.Array) -> jax.Array:
    """Returns `y + y D^T`, with y the result of a transposed use."""
    assert term.factors is not None and term.factors.inputs is not None
    names = maps.named(term, use.written, y.ndim, "in")
    own = maps.transposed(term.factors.inputs, maps.size(term, "in"))
    ends = names, "in"
    change = maps.applied(own, term, y, given=ends, wanted=ends, like=y)
    return (y.astype(change.dtype) + change).astype(y.dtype)


def branch(use: Use, term: Term, x: jax.Array, *, tied: bool, base: Typed) -> jax.Array:
    """Returns `C(x)`, or its transpose, as the term's block of the result.

    Args:
      use: a dot.
      term: with a branch.
      x: the activation, the part that the term reads.
      tied: True if the use is transposed.
      base: the frozen product, whose dimensions and sharding the result has.
    """
    assert term.factors is not None and term.factors.branch is not None
    own, read, write = term.factors.branch, "in", "out"
    if tied:
        own, read, write = maps.transposed(own, maps.size(term, "in")), "out", "in"
    given = maps.named(term, use.applied, x.ndim, read), read
    wanted = maps.named(term, use.written, base.ndim, write), write
    whole = all(term.whole(d, use.view.value.shape) for d in use.dims.write)
    like = base if whole else None
    return maps.applied(own, term, x, given=given, wanted=wanted, like=like)
