"""Exact polar factors of thin matrices, zero in directions at rounding level."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lorax import linalg

THRESHOLD = 1e-6  # singular values below this fraction of the largest are rounding


def factor(x: jax.Array) -> jax.Array:
    """Returns `U V^T` for `x = U S V^T: [n, long, short]`, zero where S is rounding."""
    u, _, vt = _svd(x)
    return linalg.dot(u, vt)


def parts(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the polar factor `U V^T` of x and the inverse `V S^-1 V^T` of its size.

    With `x = (U V^T) (V S V^T)`, the second is the inverse of the symmetric part, or
    its pseudo-inverse where S is rounding.
    """
    u, s, vt = _svd(x)
    inverse = jnp.where(s > 0, 1 / jnp.where(s > 0, s, 1), 0)[..., None]
    return linalg.dot(u, vt), linalg.dot(vt.mT, inverse * vt)


def product(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns `U` and `V^T` for `a @ b = U S V^T`, U being zero where S is rounding."""
    u, s, vt = linalg.low_rank_svd(a, b)
    return jnp.where(s[:, None, :] > THRESHOLD * s[:, None, :1], u, 0), vt


def _svd(x: jax.Array) -> linalg.Triplets:
    """The triplets of x, with U and S zero where S is rounding."""
    short = x.shape[-1]
    eye = jnp.broadcast_to(jnp.eye(short, dtype=x.dtype), (len(x), short, short))
    u, s, vt = linalg.low_rank_svd(x, eye)
    keep = s > THRESHOLD * s[:, :1]
    return jnp.where(keep[:, None, :], u, 0), jnp.where(keep, s, 0), vt
