"""Batched linear algebra of thin factors, in float32 at the highest precision."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp

from lorax import _lapack
from lorax.types import Factors

Triplets = tuple[jax.Array, jax.Array, jax.Array]

EXACT = jax.lax.Precision.HIGHEST

CLOSE: Any = {"oversample": 24, "iterations": 16}
"""Arguments of `randomized_svd` for resolving a flat spectrum, as analysis must."""


def promoted(*of: Any) -> jnp.dtype:
    """Returns the dtype that arrays or dtypes promote to, even in strict mode.

    The sums here mix precisions on purpose, by casts; `jax_numpy_dtype_promotion`
    "strict" is meant for the user's own code.
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*of)


def wide(*of: Any) -> jnp.dtype:
    """Returns the dtype in which sums over these are taken: at least float32."""
    return promoted(jnp.float32, *of)


def widened(x: jax.Array) -> jax.Array:
    """Returns the array in at least float32."""
    return x.astype(wide(x))


def dot(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the matrix product at full precision (TPU and TF32 would round)."""
    return jnp.matmul(x, y, precision=EXACT)


def svd(matrix: jax.Array, rank: int) -> Triplets:
    """Returns the `rank` largest singular triplets, by a full decomposition.

    Args:
      matrix: `[..., in, out]`.
      rank: at most min(in, out).

    Returns:
      `u: [..., in, rank]`, `s: [..., rank]` (descending), `vt: [..., rank, out]` in at
      least float32; the entry of largest magnitude in every column of u is positive.

    Example:
      >>> u, s, vt = svd(jnp.array([[0.0, -3.0], [2.0, 0.0]]), 1)
      >>> s.tolist(), abs(u).tolist(), vt.round(3).tolist()
      ([3.0], [[1.0], [0.0]], [[-0.0, -1.0]])
    """
    matrix = matrix.astype(wide(matrix))
    u, s, vt = _lapack.svd(matrix)
    return _signed(u[..., :rank], s[..., :rank], vt[..., :rank, :])


def randomized_svd(
    key: jax.Array,
    matrix: jax.Array,
    rank: int,
    *,
    oversample: int | None = None,
    iterations: int = 4,
    factors: Factors | None = None,
) -> Triplets:
    """Approximates the `rank` largest singular triplets by subspace iteration.

        Y = M Omega;  Q = qr(Y);  `iterations` times Q = qr(M qr(M^T Q));  svd(Q^T M)

    with a random Omega of `rank + oversample` columns. It takes only products with the
    matrix, QR and one small decomposition, so it costs `O(in out rank)`.

    Args:
      key: a typed key.
      matrix: `[..., in, out]`.
      rank: at most min(in, out).
      oversample: extra columns that the iteration carries; `rank` by default.
      iterations: each multiplies the suppression of what is left out by
        (s_k / s_r)^2. 4 as in PiSSA's fast variant, whose scripts use 16.
      factors: `a: [..., in, k]`, `b: [..., k, out]`, `gain: [..., out]`: decomposes
        `(matrix + a @ b) * gain` without forming it.

    Returns:
      As `svd`.

    References:
      Halko, Martinsson, Tropp, Finding Structure with Randomness, arXiv:0909.4061.
    """
    matrix = matrix.astype(wide(matrix))
    chex.assert_axis_dimension_gteq(matrix, -1, rank)
    chex.assert_axis_dimension_gteq(matrix, -2, rank)
    *batch, n, m = matrix.shape
    width = min(rank + (rank if oversample is None else oversample), n, m)
    omega = jax.random.normal(key, (*batch, m, width), matrix.dtype)

    def forward(x: jax.Array) -> jax.Array:  # [..., out, width] -> [..., in, width]
        if factors is None:
            return dot(matrix, x)
        x = x if factors.gain is None else factors.gain[..., None] * x
        return dot(matrix, x) + dot(factors.a, dot(factors.b, x))

    def backward(q: jax.Array) -> jax.Array:  # q^T M: [..., width, out]
        if factors is None:
            return dot(q.mT, matrix)
        rows = dot(q.mT, matrix) + dot(dot(q.mT, factors.a), factors.b)
        return rows if factors.gain is None else rows * factors.gain[..., None, :]

    q = orthonormal(forward(omega))
    for _ in range(iterations):
        q = orthonormal(forward(orthonormal(backward(q).mT)))
    u, s, vt = _lapack.svd(backward(q))
    u = dot(q, u)
    return _signed(u[..., :rank], s[..., :rank], vt[..., :rank, :])


def low_rank_svd(a: jax.Array, b: jax.Array) -> Triplets:
    """Returns the exact singular value decomposition of `a @ b` without forming it.

        a = Q_a R_a,   b^T = Q_b R_b,   R_a R_b^T = U diag(s) V^T
        a @ b = (Q_a U) diag(s) (Q_b V)^T

    so only a rank x rank core is decomposed.

    Args:
      a: `[..., in, rank]`.
      b: `[..., rank, out]`.

    Returns:
      As `svd`, with `min(rank, in, out)` triplets.

    Example:
      >>> a, b = jnp.array([[3.0], [4.0]]), jnp.array([[0.0, 2.0]])
      >>> u, s, vt = low_rank_svd(a, b)
      >>> s.round(3).tolist(), abs(vt).round(3).tolist()
      ([10.0], [[0.0, 1.0]])
    """
    dtype = wide(a, b)
    left, r_left = _lapack.qr(a.astype(dtype))
    right, r_right = _lapack.qr(b.astype(dtype).mT)
    core = dot(r_left, r_right.mT)
    u, s, vt = _lapack.svd(core)
    u = dot(left, u)
    return _signed(u, s, dot(vt, right.mT))


def orthonormal(matrix: jax.Array) -> jax.Array:
    """Returns an orthonormal basis of the columns, `[..., in, min(in, columns)]`."""
    return _lapack.qr(matrix)[0]


def negligible(size: jax.Array, whole: jax.Array) -> jax.Array:
    """Returns which sizes are mere rounding error relative to `whole`.

    LAPACK leaves zero singular values at a few units in the last place of the largest.
    """
    return size <= 8 * jnp.finfo(size.dtype).eps * whole


def _signed(u: jax.Array, s: jax.Array, vt: jax.Array) -> Triplets:
    """Fixes the signs, which a decomposition leaves free and differ by backend."""
    largest = jnp.argmax(jnp.abs(u), axis=-2, keepdims=True)
    sign = jnp.where(jnp.take_along_axis(u, largest, axis=-2) < 0, -1.0, 1.0)
    sign = sign.astype(u.dtype)  # [..., 1, k]
    return u * sign, s, vt * sign.mT
