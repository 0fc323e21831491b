"""Parametrisations whose update is a product of two factors, as a plain Lora."""

from __future__ import annotations

from typing import Any

from lorax.adapters import layout
from lorax.adapters.adalora import AdaLora
from lorax.adapters.lora import Lora
from lorax.adapters.sliced import SlicedLora


def as_lora(adapter: Any) -> Any:
    """Returns an AdaLora as the Lora `p @ (lam * q)`, slices as one; others pass."""
    if isinstance(adapter, SlicedLora):
        return adapter.fused()
    if not isinstance(adapter, AdaLora):
        return adapter
    dtype = layout.wide(adapter.lam, adapter.q)
    lam = adapter.lam.astype(dtype)
    lam = lam.reshape(lam.shape + (1,) * len(adapter.axes.out))
    return Lora(
        adapter.p,
        lam * adapter.q.astype(dtype),
        adapter.scale,
        adapter.axes,
        adapter.dropout,
        adapter.layers,
        adapter.moved_by,
    )
