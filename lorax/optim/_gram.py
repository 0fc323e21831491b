"""Gram matrices of a pair of factors, damped alike and inverted by `eigh`.

    N = a^T a,    M = b b^T,    N + d I,    M + d I

All r x r algebra is in the factors' dtype (at least float32) at full precision.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lorax import _checks, _lapack, linalg
from lorax.optim import _pairs


class Spectrum(NamedTuple):
    """A symmetric matrix `vectors @ diag(values) @ vectors.T`.

    Attributes:
      values: `[n, rank]`, ascending, damping included.
      vectors: `[n, rank, rank]`, as columns.
    """

    values: jax.Array
    vectors: jax.Array


def grams(pair: _pairs.Pair) -> tuple[jax.Array, jax.Array]:
    """Returns `N = a^T a` and `M = b b^T`, `[n, rank, rank]`."""
    return linalg.dot(pair.a.mT, pair.a), linalg.dot(pair.b, pair.b.mT)


def damping_of(
    pair: _pairs.Pair, damping: _checks.Number, relative: bool = True
) -> jax.Array:
    """Returns d for every matrix of the stack, `[n, 1]`.

        d = damping * max(tr N, tr M) / rank

    It is relative to both traces: while b is still zero, a fraction of M's own trace
    would be no damping at all, and the second step of `a` would not shrink with the
    learning rate.

    Args:
      pair: the factors.
      damping: the relative damping, or d itself.
      relative: False if `damping` is d itself.
    """
    traces = (jnp.sum(factor**2, axis=(1, 2))[:, None] for factor in pair[:2])
    larger = jnp.maximum(*traces)
    if not relative:
        return jnp.full_like(larger, damping)
    rank = jnp.asarray(pair.rank, larger.dtype).reshape(-1, 1)
    return (damping * larger / rank).astype(larger.dtype)


def spectra(
    pair: _pairs.Pair, damping: _checks.Number, relative: bool = True
) -> tuple[Spectrum, Spectrum]:
    """Returns the spectra of `N + d I` and `M + d I`."""
    d = damping_of(pair, damping, relative)
    n, m = grams(pair)
    return damped_spectrum(n, d), damped_spectrum(m, d)


def damped_spectrum(gram: jax.Array, d: jax.Array) -> Spectrum:
    """Returns the spectrum of `gram + d I` for a Gram matrix and d `[n, 1]`."""
    values, vectors = _lapack.eigh(gram)
    # A Gram matrix has no negative eigenvalues, but rounding can create some.
    return Spectrum(jnp.maximum(values, 0) + d, vectors)


def reciprocal(values: jax.Array) -> jax.Array:
    """Returns `1 / values` along the last axis, 0 for those at rounding level.

    Without damping this gives the pseudo-inverse; that of a zero matrix is zero.
    """
    floor = values.shape[-1] * jnp.finfo(values.dtype).eps
    lost = values <= floor * jnp.max(values, axis=-1, keepdims=True)
    return jnp.where(lost, 0, 1 / jnp.where(lost, 1, values))


def solve(spectrum: Spectrum, x: jax.Array) -> jax.Array:
    """Returns the (pseudo-)inverse of the matrix times `x: [n, rank, k]`."""
    v = spectrum.vectors
    return linalg.dot(v, reciprocal(spectrum.values)[..., None] * linalg.dot(v.mT, x))


def true_rank_only(
    a: jax.Array, b: jax.Array, rank: _pairs.Static
) -> tuple[jax.Array, jax.Array]:
    """Returns the factors with a population member's rank padding exactly zero.

    Eigenvectors mix columns at rounding level, and the padding must not move at all.
    """
    if isinstance(rank, int) and rank == a.shape[-1]:
        return a, b
    real = jnp.arange(a.shape[-1])[None, :, None] < rank  # [1 or n, rank, 1]
    return jnp.where(real.mT, a, 0), jnp.where(real, b, 0)
