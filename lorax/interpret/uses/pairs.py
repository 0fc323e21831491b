"""The thin factors of a kernel as a use of it needs them: as made, or transposed."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lorax import linalg
from lorax.interpret.terms.tracked import Term
from lorax.interpret.uses import grouped, mapped, thin
from lorax.interpret.uses.use import Use
from lorax.types import Axes


class Pair(NamedTuple):
    """The two thin factors in the order of a use.

    Attributes:
      first: `[*batch, *read, rank]`, batch and read in view order.
      second: `[*batch, rank, *write]`.
      tied: True if the use is transposed: it reads what the leaf writes.
      places: None; or, if an axis of the factors has another role in this use (an
        expert axis that it writes or sums over), the dimensions that they have.
    """

    first: jax.Array
    second: jax.Array
    tied: bool
    places: grouped.Places | None = None


def fits(use: Axes, made: Axes) -> bool | None:
    """Tells whether factors made for some axes fit a dot that uses a leaf along others.

    They do if every axis of `in` is read or batched, and every axis of `out` written or
    batched; an axis of the batch may be anything, since both factors have it. Only axes
    longer than one count.

    Returns:
      False: as made. True: transposed (tied). None: the product has no low-rank form.
    """
    read, write, _ = map(set, use)
    for tied, (in_, out) in enumerate([(made.in_, made.out), (made.out, made.in_)]):
        if not write & {*in_} and not read & {*out}:
            return bool(tied)
    return None


def oriented(use: Use, result: jnp.dtype) -> list[Pair] | None:
    """Returns the factors of every term for this use; None if one has no such form.

    Args:
      use: whose view has the terms.
      result: dtype of the branch's result.
    """
    found = [_oriented(use, term, result) for term in use.view.terms]
    pairs = [pair for pair in found if pair is not None]
    return pairs if len(pairs) == len(found) else None


def _oriented(use: Use, term: Term, result: jnp.dtype) -> Pair | None:
    """One term's factors for a use: as made, transposed (tied), or None.

    The first is cast to the kernel's dtype, the second to the result's if that is
    wider: rounding it, and `x @ first`, would lose more than rounding the kernel did.
    """
    axes = use.axes(term)
    if axes is None or not use.low_rank or term.factors is None or term.axes is None:
        return None
    sized = lambda axes: Axes(*(tuple(sorted(term.sized(group))) for group in axes))
    here, made = sized(axes), sized(term.axes)
    tied = fits(here, made)
    if tied is None or not mapped.acts(use, term, tied):
        return None
    a, b = term.factors[:2]
    n, rank = len(term.dims("batch")), a.shape[-1]
    first, second = (jnp.moveaxis(b, n, -1), jnp.moveaxis(a, -1, n)) if tied else (a, b)
    read, write, batch = map(sorted, use.dims)
    places = None
    plain = here == (Axes(made.out, made.in_, made.batch) if tied else made)
    if not plain or any(map(term.added, (*use.dims.read, *use.dims.write))):
        if use.op != "dot" or term.factors.maps:
            return None
        places = _places(term, tied)
        if places is None:
            return None
        batch, write = list(places.both), list(places.second)
        read = [d for d in places.first if d not in batch]
    size = lambda dims: [term.shape[d] for d in dims]
    dtype = thin.operand_dtype(use.view.value.dtype)
    first = first.astype(dtype).reshape(*size(batch), *size(read), rank)
    second = second.astype(linalg.promoted(dtype, result))
    second = second.reshape(*size(batch), rank, *size(write))
    return Pair(first, second, tied, places)


def _places(term: Term, tied: bool) -> grouped.Places | None:
    """The dimensions that a term's factors have; those of length one are left out."""
    dims = range(len(term.labels))
    own = [d for d in dims if term.shape[d] > 1 or term.sized(term.labels[d])]
    kinds = {d: term.kind(d) for d in own}
    if None in kinds.values():
        return None
    of = lambda kind: tuple(d for d in own if kinds[d] == kind)
    both, read, write = of("batch"), of("in"), of("out")
    if tied:
        read, write = write, read
    return grouped.Places((*both, *read), both, write)
