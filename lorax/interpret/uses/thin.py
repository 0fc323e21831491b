"""The low-rank branch as XLA operations: products, dropout, and when to flatten."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lorax import _explicit, tree
from lorax.interpret.terms.tracked import Term

Both = tuple[Sequence[int], Sequence[int]]
"""Dimensions of the two operands that meet each other."""


class Result(NamedTuple):
    """How a product is computed.

    Attributes:
      precision: of the operation on the kernel.
      dtype: of the result.
      lies: how the result is sharded, see `lorax._explicit`.
    """

    precision: jax.lax.PrecisionLike
    dtype: jnp.dtype
    lies: _explicit.Entries


def operand_dtype(kernel: jnp.dtype) -> jnp.dtype:
    """The dtype in which factors enter a product with a kernel of this dtype.

    It is the kernel's own, except for 8-bit floats, whose range a factor would leave.
    """
    return jnp.dtype(kernel) if jnp.dtype(kernel).itemsize > 1 else jnp.bfloat16


def window(
    x: jax.Array, term: Term, x_read: Sequence[int], read: Sequence[int]
) -> jax.Array:
    """Returns the part of the activation that a term reads."""
    for dim, own in zip(x_read, read, strict=True):
        low, size = term.start[own], term.shape[own]
        if size != x.shape[dim]:
            x = jax.lax.slice_in_dim(x, low, low + size, axis=dim)
    return x


def dropped(x: jax.Array, term: Term, key: jax.Array | None) -> jax.Array:
    """Returns the branch's input after dropout; the same key drops the same."""
    if key is None or term.rate == 0.0:
        return x
    key = tree.fold_path(key, term.path)
    # each shard draws a mask of its own
    for axis in sorted(jax.typeof(x).manual_axis_type.varying):
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    keep = jax.random.bernoulli(key, 1.0 - term.rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1.0 - term.rate, x.dtype), 0)


def dot(
    x: jax.Array,
    first: jax.Array,
    second: jax.Array,
    *,
    read: Both,
    batch: Both,
    result: Result,
) -> jax.Array:
    """Returns `(x @ first) @ second`.

    On a single CPU device every product is two-dimensional: to contract a factor's
    gradient over two leading axes, XLA copies the activation transposed, which costs
    more than the step itself. And the gradient of `first` has to come out as [rank,
    in]: after a plain transpose XLA rewrites it to [in, rank], which its library runs
    far slower. Negating both factors, which is exact, prevents that; so did a barrier,
    but XLA:CPU aborted on it under vmap. `experiments.benchmarks.adapt_cost` times it.

    Args:
      x: the activation; the left operand of every product.
      first: `[*batch, *read, rank]`.
      second: `[*batch, rank, *write]`.
      read: contracted dimensions of x and of `first`.
      batch: batch dimensions of x and of `first`.
      result: how it is computed; `x @ first` likewise.

    Returns:
      `[*batch, *free dimensions of x, *write]`.
    """
    precision, _, lies = result
    if x.dtype.itemsize == 1:  # 8 bits: the factors come in bfloat16
        x = x.astype(first.dtype)
    if not batch[0] and _cpu_alone(x):
        free = [d for d in range(x.ndim) if d not in read[0]]
        sizes = [x.shape[d] for d in free]
        rank, width = first.shape[-1], math.prod(x.shape[d] for d in read[0])
        x = _flat(x.transpose(*free, *read[0]), math.prod(sizes), width)
        first = _flat(first.transpose(first.ndim - 1, *read[1]), rank, width)
        first, second = -first, -second
        numbers = (((1,), (1,)), ((), ()))
        h = jax.lax.dot_general(
            x, first, numbers, precision, preferred_element_type=second.dtype
        )
        h = _explicit.reshape(h, (*sizes, rank), (*lies[: len(sizes)], None))
    else:
        kept = x.ndim - len(read[0])  # batch dimensions and free ones
        h = _explicit.dot(
            x,
            first,
            (read, batch),
            precision,
            dtype=second.dtype,
            wanted=(*lies[:kept], None),
        )
    # h keeps the batch dimensions in the equation's order, `second` in view order
    feature = h.ndim - 1
    return mix(h, second, feature=feature, batch=tuple(batch[1]), result=result)


def mix(
    h: jax.Array,
    second: jax.Array,
    *,
    feature: int,
    batch: tuple[int, ...] = (),
    result: Result,
) -> jax.Array:
    """Returns `h @ second`.

    Args:
      h: `[*batch, ..., rank, ...]`, the rank at dimension `feature`.
      second: `[*batch, rank, *write]`.
      feature: where h has the rank.
      batch: for each leading dimension of h, the batch dimension of `second`.
      result: how it is computed.

    Returns:
      `[*batch, ..., *write]`.
    """
    n, h = len(batch), h.astype(second.dtype)
    if n == 0 and _cpu_alone(h):
        *sizes, rank = jnp.moveaxis(h, feature, -1).shape
        y = jax.lax.dot_general(
            _flat(jnp.moveaxis(h, feature, -1), math.prod(sizes), rank),
            _flat(second, rank, math.prod(second.shape[1:])),
            (((1,), (0,)), ((), ())),
            result.precision,
            preferred_element_type=result.dtype,
        )
        return _explicit.reshape(y, (*sizes, *second.shape[1:]), result.lies)
    return _explicit.dot(
        h,
        second,
        (((feature,), (n,)), (tuple(range(n)), batch)),
        result.precision,
        dtype=result.dtype,
        wanted=result.lies,
    )


def mix_groups(
    h: jax.Array, second: jax.Array, *, feature: int, groups: int, result: Result
) -> jax.Array:
    """`mix` of a grouped convolution: each group mixes its own channels."""
    h = jnp.moveaxis(h, feature, -1).astype(second.dtype)
    rank, width = second.shape[0], second.shape[1] // groups
    free, shape = [*result.lies[:-1]], h.shape[:-1]
    h = _explicit.reshape(h, (*shape, groups, rank), (*free, None, None))
    second = _explicit.reshape(second, (rank, groups, width), (None, None, None))
    z = _explicit.dot(
        h,
        second,
        (((h.ndim - 1,), (0,)), ((h.ndim - 2,), (1,))),
        result.precision,
        dtype=result.dtype,
        wanted=[None, *free, None],
    )
    z = jnp.moveaxis(z, 0, -2)  # [*free, groups, width]
    return _explicit.reshape(z, (*shape, groups * width), result.lies)


def alone(x: jax.Array) -> bool:
    """True on a single device: elsewhere a reshape could merge sharded axes."""
    mesh = jax.typeof(x).sharding.mesh
    return mesh.empty or mesh.size == 1


def _flat(x: jax.Array, rows: int, columns: int) -> jax.Array:
    """Returns a matrix, whole on an Explicit mesh (which has one device)."""
    return _explicit.reshape(x, (rows, columns), (None, None))


def _cpu_alone(x: jax.Array) -> bool:
    return jax.default_backend() == "cpu" and alone(x)
