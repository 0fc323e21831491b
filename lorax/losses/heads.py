"""Heads, and their logits a few positions at a time.

Shared by the losses that never hold the logits of all tokens: the head, how positions
are cut into chunks, and the logits of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from lorax import _explicit

PER_HIDDEN = 4
"""Logits of a chunk, as a multiple of the entries of all hidden states."""
LEAST = 1024
"""Fewest tokens of a chunk: with fewer, the head is read too often."""


class Head(NamedTuple):
    """Turns hidden states into logits.

    Attributes:
      kernel: `[width, vocabulary]`; if `tied`, an embedding `[vocabulary, width]`.
      tied: whether the kernel is an embedding.
      bias: `[vocabulary]`, added to the logits.
      soft_cap: logits l become `soft_cap * tanh(l / soft_cap)` (Gemma 2: 30); None:
        no cap.
    """

    kernel: jax.Array
    tied: bool = False
    bias: jax.Array | None = None
    soft_cap: float | None = None

    @property
    def width(self) -> int:
        """Width of the hidden states that it reads."""
        return self.kernel.shape[1 if self.tied else 0]

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return self.kernel.shape[0 if self.tied else 1]


def chunk_of(shape: Sequence[int], vocabulary: int) -> int:
    """Returns how many positions of every row a chunk has by default.

    A chunk has about four logits for every entry of all hidden states, a ratio that
    does not change when a batch is sharded over devices, but at least 1,024 tokens.

    Args:
      shape: of the hidden states, `[*batch, time, width]`.
      vocabulary: number of tokens.

    Returns:
      The number of positions, at most `time`.

    Example:
      >>> chunk_of((16, 4096, 4096), 128_256)
      523
    """
    *batch, time, width = shape
    least = -(-LEAST // max(math.prod(batch), 1))
    return min(time, max(PER_HIDDEN * time * width // vocabulary, least, 1))


def checked(
    hidden: jax.Array,
    head: Head | jax.Array,
    targets: jax.Array,
    chunk: int | None,
) -> Head:
    """Returns the head, once shapes and options have been checked."""
    head = head if isinstance(head, Head) else Head(head)
    if hidden.ndim < 2 or hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"hidden has shape {hidden.shape} and targets {targets.shape}; they must "
            "be [*batch, time, width] and [*batch, time]"
        )
    if head.kernel.ndim != 2 or head.width != hidden.shape[-1]:
        wanted = "[vocabulary, width]" if head.tied else "[width, vocabulary]"
        raise ValueError(
            f"the head has shape {head.kernel.shape} and hidden states of width "
            f"{hidden.shape[-1]}; it must be {wanted}; give an embedding as "
            "Head(kernel, tied=True)"
        )
    if head.bias is not None and head.bias.shape != (head.vocabulary,):
        raise ValueError(f"bias has shape {head.bias.shape}; give ({head.vocabulary},)")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk}; give at least one position, or None")
    if head.soft_cap is not None and head.soft_cap <= 0:
        raise ValueError(f"soft_cap={head.soft_cap}; it must be above 0, or None")
    return head


def shared(head: Head, hidden: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Kernel and bias as every chunk reads them, the whole width on each device."""
    kernel, read = head.kernel.astype(hidden.dtype), 1 if head.tied else 0
    if _explicit.is_explicit(kernel):
        lies = _explicit.entries(kernel)
        lies[read] = None
        return _explicit.moved(kernel, lies, kernel), head.bias
    if AxisType.Auto in jax.sharding.get_abstract_mesh().axis_types:
        # else it may be gathered while the layers run, and take up memory
        first = jax.lax.stop_gradient(hidden)  # so that a frozen kernel has no tangent
        _, kernel = jax.lax.optimization_barrier((first, kernel))
        dims: list[Any] = [PartitionSpec.UNCONSTRAINED] * 2
        dims[read] = None
        kernel = jax.lax.with_sharding_constraint(kernel, PartitionSpec(*dims))
    return kernel, head.bias


def cut(x: jax.Array, size: int, axis: int) -> jax.Array:
    """Cuts `[*batch, time, ...]` into `[chunks, ...]` of at most `size` positions.

    Each chunk takes positions from all over the sequence, so that devices that share a
    sequence share every chunk.
    """
    count = -(-x.shape[axis] // size)
    if missing := -x.shape[axis] % count:
        border = [(0, missing * (d == axis)) for d in range(x.ndim)]
        x = jnp.pad(x, border)  # weights too, with 0
    shape = [*x.shape[:axis], x.shape[axis] // count, count, *x.shape[axis + 1 :]]
    lies = _explicit.entries(x)
    cut = _explicit.reshape(x, shape, [*lies[: axis + 1], None, *lies[axis + 1 :]])
    return jnp.moveaxis(cut, axis + 1, 0)


def joined(chunks: jax.Array, axis: int) -> jax.Array:
    """Undoes `cut` for results `[chunks, *batch, size]`."""
    x = jnp.moveaxis(chunks, 0, axis + 1)
    shape = [*x.shape[:axis], x.shape[axis] * x.shape[axis + 1]]
    return _explicit.reshape(x, shape, _explicit.entries(x)[: axis + 1])


def logits(
    hidden: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    tied: bool,
    soft_cap: float | None,
) -> jax.Array:
    """Float32 logits of a product in the compute dtype, as models compute them."""
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    read = ((hidden.ndim - 1,), (1 if tied else 0,)), ((), ())
    logits = _explicit.dot(hidden, kernel, read).astype(wide)
    if bias is not None:
        logits = logits + bias.astype(wide)
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
