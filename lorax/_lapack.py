"""QR, SVD, eigenvectors, inverses of stacks, one by one where jaxlib could hang.

Up to jaxlib 0.11.0 a stack that XLA:CPU hands to LAPACK is spread over the pool of
threads from within the pool: as many such calls at once as the pool has threads wait
for one another for good. On two cores a step of Muon, vmapped over members, comes to
that. A loop over the matrices keeps every call single. From 0.11.1 on, and on any
accelerator, these are `jax.numpy.linalg`'s functions as they are.
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
"""The first version of jax, and of the jaxlib it asks for, that takes stacks safely."""


def one_by_one(decompose: Decompose) -> Decompose:
    """Returns `decompose` for stacks that a CPU takes matrix by matrix.

    `jax.vmap` adds to the stack; of a derivative it makes whole stacks again.

    Args:
      decompose: of one matrix or a stack `[..., m, n]`, to a tuple of arrays with the
        same leading axes.
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
        del axis_size, batched  # of one argument, which is batched, or no rule is asked
        found = stacked(x)
        return found, tuple(True for _ in found)

    @jax.custom_jvp
    @jax.jit  # outside of a program too a shape compiles once
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
    """Matrices whole on every device: the decompositions take them no other way."""
    return _explicit.moved(x, [*_explicit.entries(x)[:-2], None, None], x)


def qr(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns q `[..., m, k]` and r `[..., k, n]` of x `[..., m, n]`, k = min(m, n)."""
    q, r = _qr(_whole(x))
    return q, r


def svd(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns u `[..., m, k]`, s `[..., k]` in falling order and vt `[..., k, n]`."""
    u, s, vt = _svd(_whole(x))
    return u, s, vt


def eigh(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the eigenvalues `[..., n]`, ascending, and vectors of symmetric `x`."""
    values, vectors = _eigh(_whole(x))
    return values, vectors


def inverse(x: jax.Array) -> jax.Array:
    """Returns the inverses `[..., n, n]` of regular matrices `x`."""
    (found,) = _inverse(_whole(x))
    return found
