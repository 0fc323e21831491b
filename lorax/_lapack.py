"""QR, SVD, eigenvectors and inverses of stacks, one by one where jaxlib could hang.

Up to jaxlib 0.11.0, XLA:CPU spreads a stack of LAPACK calls over its thread pool from
within that pool: with as many such calls in flight as the pool has threads, they
deadlock. On two cores, a step of Muon vmapped over members does this. A loop over the
matrices avoids it. From 0.11.1 on, and on any accelerator, these are the functions of
`jax.numpy.linalg`, unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lorax import _explicit

Parts = tuple[jax.Array, ...]
Decompose = Callable[[jax.Array], Parts]

FIXED = (0, 11, 1)
"""The first jax version (with the jaxlib it requires) that handles stacks safely."""


def one_by_one(decompose: Decompose) -> Decompose:
    """Returns a `decompose` that loops over the matrices of a stack on the CPU.

    `jax.vmap` adds to the stack; a vmapped derivative still gets whole stacks.

    Args:
      decompose: takes one matrix or a stack `[..., m, n]` and returns a tuple of arrays
        with the same leading axes.
    """

    def each(function: Callable[..., Any], *stacks: jax.Array) -> Any:
        leading = stacks[0].shape[:-2]
        if not leading:
            return function(*stacks)
        flat = [x.reshape(-1, *x.shape[-2:]) for x in stacks]
        found = jax.lax.map(lambda matrices: function(*matrices), flat)
        return jax.tree.map(lambda x: x.reshape(*leading, *x.shape[1:]), found)

    def by_platform(function: Callable[..., Any], *stacks: jax.Array) -> Any:
        def loop(*given: jax.Array) -> Any:
            return each(function, *given)

        return jax.lax.platform_dependent(*stacks, cpu=loop, default=function)

    @jax.custom_batching.custom_vmap
    def stacked(x: jax.Array) -> Parts:
        return by_platform(decompose, x)

    @stacked.def_vmap
    def _more(axis_size: int, batched: list[bool], x: jax.Array) -> tuple[Parts, Any]:
        del axis_size, batched  # the rule is only called when the argument is batched
        found = stacked(x)
        return found, tuple(True for _ in found)

    @jax.custom_jvp
    @jax.jit  # so that eager calls, too, compile once per shape
    def result(x: jax.Array) -> Parts:
        return stacked(x)

    @result.defjvp
    def _jvp(primals: Any, tangents: Any) -> Any:
        def forward(x: jax.Array, t: jax.Array) -> Any:
            return jax.jvp(decompose, (x,), (t,))

        return by_platform(forward, *primals, *tangents)

    return result


def _guarded(decompose: Decompose) -> Decompose:
    return decompose if jax.__version_info__ >= FIXED else one_by_one(decompose)


_qr = _guarded(lambda x: tuple(jnp.linalg.qr(x)))
_svd = _guarded(lambda x: tuple(jnp.linalg.svd(x, full_matrices=False)))
_eigh = _guarded(lambda x: tuple(jnp.linalg.eigh(x)))
_inverse = _guarded(lambda x: (jnp.linalg.inv(x),))


def _whole(x: jax.Array) -> jax.Array:
    """The matrices, replicated on every device as the decompositions require."""
    return _explicit.moved(x, [*_explicit.entries(x)[:-2], None, None], x)


def qr(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns q `[..., m, k]` and r `[..., k, n]` of x `[..., m, n]`, k = min(m, n)."""
    q, r = _qr(_whole(x))
    return q, r


def svd(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns u `[..., m, k]`, s `[..., k]` (descending) and vt `[..., k, n]`."""
    u, s, vt = _svd(_whole(x))
    return u, s, vt


def eigh(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the eigenvalues `[..., n]` (ascending) and vectors of symmetric `x`."""
    values, vectors = _eigh(_whole(x))
    return values, vectors


def inverse(x: jax.Array) -> jax.Array:
    """Returns the inverses `[..., n, n]` of invertible matrices `x`."""
    (found,) = _inverse(_whole(x))
    return found
