"""Linear algebra of thin factors: float32 at the highest precision, batched."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def low_rank_svd(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the exact singular value decomposition of `a @ b`, never formed.

        a = Q_a R_a,   b^T = Q_b R_b,   R_a R_b^T = U diag(s) V^T
        a @ b = (Q_a U) diag(s) (Q_b V)^T

    so the decomposition itself is of a rank x rank core. The signs are fixed: the entry
    of largest magnitude in every column of u is positive.

    Args:
      a: `[..., in, rank]`.
      b: `[..., rank, out]`.

    Returns:
      `u: [..., in, k]`, `s: [..., k]` in falling order and `vt: [..., k, out]` in at
      least float32, `k = min(rank, in, out)`.

    Example:
      >>> a, b = jnp.array([[3.0], [4.0]]), jnp.array([[0.0, 2.0]])
      >>> u, s, vt = low_rank_svd(a, b)
      >>> s.round(3).tolist(), abs(vt).round(3).tolist()
      ([10.0], [[0.0, 1.0]])
    """
    dtype = jnp.result_type(jnp.float32, a, b)
    exact = jax.lax.Precision.HIGHEST
    left, r_left = jnp.linalg.qr(a.astype(dtype))
    right, r_right = jnp.linalg.qr(b.astype(dtype).mT)
    core = jnp.matmul(r_left, r_right.mT, precision=exact)
    u, s, vt = jnp.linalg.svd(core, full_matrices=False)
    u = jnp.matmul(left, u, precision=exact)
    vt = jnp.matmul(vt, right.mT, precision=exact)
    largest = jnp.argmax(jnp.abs(u), axis=-2, keepdims=True)
    sign = jnp.where(jnp.take_along_axis(u, largest, axis=-2) < 0, -1.0, 1.0)
    sign = sign.astype(dtype)  # [..., 1, k]
    return u * sign, s, vt * sign.mT
