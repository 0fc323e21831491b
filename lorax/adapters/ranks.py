"""The ranks of an adapter: finds their axes, pads them with zeros, and cuts them.

a @ b = [a 0] @ [b; 0]
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lorax.adapters import layout


def axes_of(adapter: Any) -> dict[str, int]:
    """Returns the index of the rank axis of each trained field that has one."""
    return {
        name: layout.axis_of(adapter, name, "rank")
        for name in adapter.roles
        if "rank" in adapter.fields[name].words
    }


def padded(adapter: Any, rank: int) -> Any:
    """Returns the adapter padded with zeros up to `rank`, with the same update.

    Raises:
      ValueError: a class whose update would change through padding.
    """
    if not adapter.padded and rank > adapter.rank:
        raise ValueError(
            f"{type(adapter).__name__} of rank {adapter.rank} cannot be padded to "
            f"{rank}: zeros in its arrays would change its update; give all sets the "
            "same rank"
        )
    fields = {}
    for name, axis in axes_of(adapter).items():
        field = getattr(adapter, name)
        widths = [(0, 0)] * field.ndim
        widths[axis] = (0, rank - field.shape[axis])
        fields[name] = jnp.pad(field, widths) if rank > adapter.rank else field
    return adapter.replace(**fields)


def cut(adapter: Any, rank: int) -> Any:
    """Returns the adapter without its padding: only the leading `rank` ranks."""
    if not adapter.padded:
        return adapter
    leading = {
        name: jax.lax.slice_in_dim(getattr(adapter, name), 0, rank, axis=axis)
        for name, axis in axes_of(adapter).items()
    }
    return adapter.replace(**leading)


def masked(adapter: Any, rank: Any) -> Any:
    """Returns the adapter with zeros beyond its first `rank` ranks.

    Args:
      adapter: holds parameters, gradients or updates.
      rank: a number, which may be traced.
    """

    def kept(field: jax.Array, axis: int) -> jax.Array:
        numbers = jnp.arange(field.shape[axis])
        others = [d for d in range(field.ndim) if d != axis]
        own = jnp.expand_dims(numbers, others) < rank
        return jnp.where(own, field, jnp.zeros((), field.dtype))

    return adapter.replace(
        **{n: kept(getattr(adapter, n), axis) for n, axis in axes_of(adapter).items()}
    )
