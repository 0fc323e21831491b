"""The sum of a frozen product and its branch, times a gain, plus a bias.

    y = (base + branch) * gain + bias

The gain's gradient needs `u = base + branch`, an array of the result's size for every
kernel (1.3 x the temporary memory of a LoRA step). What follows keeps y anyway, so u is
read off it, `(y - bias) / gain`. Where y does not determine u (a gain of zero, a column
below the smallest number of the dtype, a bias far above the product), the outputs
concerned are computed again, in blocks. Lookups, grouped rows and products on a mesh
are not made of blocks, and keep u.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lorax import _explicit
from lorax.types import PyTree

BLOCKS = 16  # at most this many are computed again, each only if it has to be
SHARE = 64.0  # |y|^2 over |y - bias|^2 above which too many digits of u are lost

Run = Callable[[PyTree, jax.Array, int], jax.Array]
"""`(operands, begin, size) -> block` of a result."""
How = tuple[Run, int]
"""Such a function, and the dimension of the result along which blocks are cut."""
Parts = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""Base, branch, gain and bias."""


class Again(NamedTuple):
    """How `base + branch` is computed again, a block of outputs at a time.

    Attributes:
      run: computes a block.
      operands: arrays and views that the forward pass has.
      dim: dimension of the result along which blocks are cut.
    """

    run: Run
    operands: PyTree
    dim: int


@dataclasses.dataclass(frozen=True)
class Pending:
    """The parts of an adapted result that waits for an addition, its only reader.

    Adding the bias to the frozen part first, `(x @ W + bias) + branch`, lets XLA fuse
    the last sum into what follows; in the other order it keeps both sums for the
    backward pass. With a gain the parts go to `total`, together with the bias.

    Attributes:
      base: the frozen product.
      branch: the low-rank part, in at least float32.
      gain: broadcasts against them; None for 1.
      again: for the gain's gradient; None: the sum is kept for it.
    """

    base: jax.Array
    branch: jax.Array
    gain: jax.Array | None = None
    again: Again | None = None


def total(parts: Pending, bias: jax.Array | None = None) -> jax.Array:
    """Returns `(base + branch) * gain + bias` in the dtype of `base`.

    Args:
      parts: of the sum.
      bias: broadcasts against them; None for 0.
    """
    base, branch, gain = parts.base, parts.branch, parts.gain
    if gain is None:
        both = base.astype(branch.dtype) + branch
        return (both if bias is None else both + bias).astype(base.dtype)
    zero = jnp.zeros((), branch.dtype)
    bias = zero if bias is None else bias.astype(branch.dtype)
    gain = _explicit.like(gain.astype(branch.dtype), base)
    if parts.again is None:
        return _keeping(base, branch, gain, bias)
    how = parts.again.run, parts.again.dim
    return _reading(how, base, branch, gain, bias, parts.again.operands)


def _value(
    base: jax.Array, branch: jax.Array, gain: jax.Array, bias: jax.Array
) -> jax.Array:
    kept = base.astype(branch.dtype) * gain + bias
    return (kept + branch * gain).astype(base.dtype)


@jax.custom_jvp
def _keeping(
    base: jax.Array, branch: jax.Array, gain: jax.Array, bias: jax.Array
) -> jax.Array:
    """The value; u is kept in the dtype of `base`."""
    return _value(base, branch, gain, bias)


@_keeping.defjvp
def _keeping_jvp(primals: Parts, tangents: Parts) -> tuple[jax.Array, jax.Array]:
    base, branch, gain, _ = primals
    d_base, d_branch, d_gain, d_bias = tangents
    wide = branch.dtype
    u = (base.astype(wide) + branch).astype(base.dtype)
    dy = (d_base.astype(wide) + d_branch) * gain + d_bias + u.astype(wide) * d_gain
    return _value(*primals), dy.astype(base.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _reading(
    how: How,
    base: jax.Array,
    branch: jax.Array,
    gain: jax.Array,
    bias: jax.Array,
    operands: PyTree,
) -> jax.Array:
    """The value; u is read off it or computed again, and nothing is kept."""
    del how, operands
    return _value(base, branch, gain, bias)


@_reading.defjvp
def _reading_jvp(
    how: How, primals: PyTree, tangents: PyTree
) -> tuple[jax.Array, jax.Array]:
    base, branch, gain, bias, operands = primals
    d_base, d_branch, d_gain, d_bias, _ = tangents
    y = _reading(how, *primals)

    def along(d_gain: jax.Array, *known: PyTree) -> jax.Array:
        return _sum(Again(how[0], known[-1], how[1]), *known[:-1]) * d_gain

    # replayed in the backward pass: what it computes is not kept
    along = jax.checkpoint(along, prevent_cse=False)
    dy = (d_base.astype(branch.dtype) + d_branch) * gain + d_bias
    dy = dy + along(d_gain, y, gain, bias, operands)
    return y, dy.astype(base.dtype)


def _sum(again: Again, y: jax.Array, gain: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns u in the dtype of the gain."""
    part = y.astype(gain.dtype) - bias
    lost = ~_held(y, part, gain)
    read = part / jnp.where(gain == 0, 1, gain)
    size = y.shape[again.dim]
    width = max(d for d in range(1, max(size // BLOCKS, 1) + 1) if size % d == 0)

    def cut(v: jax.Array, begin: jax.Array) -> jax.Array:
        if v.shape[again.dim] != size:
            return v
        return jax.lax.dynamic_slice_in_dim(v, begin, width, again.dim)

    def block(begin: jax.Array) -> jax.Array:
        return jax.lax.cond(
            jnp.any(cut(lost, begin)),
            lambda: again.run(again.operands, begin, width).astype(gain.dtype),
            lambda: cut(read, begin),
        )

    def blocks() -> jax.Array:
        found = jax.lax.map(jax.checkpoint(block), jnp.arange(0, size, width))
        return jnp.moveaxis(found, 0, again.dim).reshape(y.shape)

    return jax.lax.cond(jnp.any(lost), blocks, lambda: read)


def _held(y: jax.Array, part: jax.Array, gain: jax.Array) -> jax.Array:
    """True where `y - bias` has the digits of `u * gain`."""
    along = tuple(d for d in range(y.ndim) if gain.shape[d] == 1)
    square = lambda v: jnp.sum(v.astype(gain.dtype) ** 2, along, keepdims=True)
    largest = jnp.max(jnp.abs(part), along, keepdims=True, initial=0)
    digits = square(y) <= SHARE * square(part)
    return (gain != 0) & digits & (largest >= float(jnp.finfo(y.dtype).tiny))
