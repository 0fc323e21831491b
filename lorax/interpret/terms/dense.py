"""The merged view, for where no low-rank form of a kernel can be used."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp

from lorax import _explicit, linalg
from lorax.interpret.terms import maps
from lorax.interpret.terms.tracked import Term, Tracked


def dense(tracked: jax.Array | Tracked) -> jax.Array:
    """Returns the merged view, accumulated in float32 and rounded once; arrays pass."""
    if not isinstance(tracked, Tracked):
        return tracked
    kernel, shape = tracked.array, tracked.value.shape
    dtype = linalg.wide(kernel.dtype)
    total = kernel.astype(dtype)
    for term in tracked.terms:
        if term.factors is None:
            return kernel
        for part in maps.dense(term, kernel):
            total = total + _explicit.like(part, total)
        a, b = term.factors[:2]
        if not a.shape[-1]:
            continue
        batch, in_, out = (term.dims(kind) for kind in ("batch", "in", "out"))
        order, n = batch + in_ + out, len(batch)
        product = _explicit.dot(
            a.astype(dtype),
            b.astype(dtype),
            (((a.ndim - 1,), (n,)), (tuple(range(n)),) * 2),
            jax.lax.Precision.HIGHEST,
        ).transpose([order.index(d) for d in sorted(order)])
        units = [d for d in range(len(shape)) if d not in order]
        product = place(jnp.expand_dims(product, units), term.start, shape)
        total = total + _explicit.like(product, total)
    for term in tracked.terms:
        if (gain := gains(term, range(len(shape)), shape)) is not None:
            total = total * gain.astype(dtype)
    return total.astype(kernel.dtype)


def ungained(tracked: Tracked) -> Tracked:
    """Returns a view without the gains of its terms."""
    plain = []
    for term in tracked.terms:
        if term.factors is not None:
            term = dataclasses.replace(term, factors=term.factors._replace(gain=None))
        plain.append(term)
    return Tracked(tracked.value, tuple(plain))


def block_of(tracked: Tracked, dim: int, begin: jax.Array, size: int) -> Tracked:
    """Returns a block of a view along a dimension that every term fills."""
    cut = lambda v, axis: jax.lax.dynamic_slice_in_dim(v, begin, size, axis)
    put = lambda shape: (*shape[:dim], size, *shape[dim + 1 :])
    terms = (term.edit(dim, cut, shape=put(term.shape)) for term in tracked.terms)
    return Tracked(cut(tracked.array, dim), tuple(terms))


def gains(term: Term, dims: Iterable[int], shape: Sequence[int]) -> jax.Array | None:
    """Returns a term's gain along dimensions of its view, with ones outside its block.

    Args:
      term: if it has no gain, returns None.
      dims: dimensions of the view, its batch and out dimensions among them, in the
        order of the result.
      shape: of the view.
    """
    if term.factors is None or term.factors.gain is None:
        return None
    dims, own = list(dims), term.dims("batch") + term.dims("out")
    gain = term.factors.gain.transpose([own.index(d) for d in dims if d in own])
    gain = gain.reshape([term.shape[d] if d in own else 1 for d in dims])
    needed = [d in own or not term.whole(d, shape) for d in dims]
    full = [shape[d] if need else 1 for d, need in zip(dims, needed, strict=True)]
    block = [term.shape[d] if need else 1 for d, need in zip(dims, needed, strict=True)]
    start = [term.start[d] if need else 0 for d, need in zip(dims, needed, strict=True)]
    return place(jnp.broadcast_to(gain, block), start, full, fill=1.0)


def place(
    block: jax.Array, start: Sequence[int], shape: Sequence[int], fill: float = 0.0
) -> jax.Array:
    """Returns `block` at offset `start` in a constant of the given shape."""
    if block.shape == tuple(shape):
        return block
    padding = [
        (lo, full - lo - size, 0)
        for lo, size, full in zip(start, block.shape, shape, strict=True)
    ]
    return jax.lax.pad(block, jnp.full((), fill, block.dtype), padding)
