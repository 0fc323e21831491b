"""Factors beside a quantised leaf, decoding one kernel of a stack at a time."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp

from lorax.adapters import layout
from lorax.quantized import Quantized, chosen, map_kernels
from lorax.types import Adapter, Axes, Factors


def by_kernel(adapter: Adapter, leaf: Quantized) -> bool:
    """True if `factors` holds at most one kernel of a stack dense at a time."""
    if not adapter.reads_kernel or not leaf.axes.batch:
        return True
    axes = getattr(adapter, "axes", None)
    return axes == leaf.axes and all(
        field.words[0] == "batch" for field in adapter.fields.values()
    )


def factors(adapter: Adapter, leaf: Quantized) -> Factors | None:
    """Returns `adapter.factors` beside a quantised leaf.

    Whatever it decodes is decoded again in the backward pass instead of being kept.
    """
    if not adapter.reads_kernel:
        alike: Any = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        return adapter.factors(alike)
    if not leaf.axes.batch or not by_kernel(adapter, leaf):
        whole = lambda adapter, leaf: adapter.factors(jnp.asarray(leaf))
        return jax.checkpoint(whole)(adapter, leaf)
    layers = getattr(adapter, "layers", None)
    arrays = {name: getattr(adapter, name) for name in adapter.fields}

    def one(kernel: jax.Array, axes: Axes, arrays: dict[str, Any]) -> Factors | None:
        fields = {**arrays, "axes": axes, **({"layers": None} if layers else {})}
        return dataclasses.replace(cast(Any, adapter), **fields).factors(kernel)

    part = leaf if layers is None else chosen(leaf, layers)
    form = map_kernels(one, part, arrays)
    if form is None or layers is None:
        return form
    depth = leaf.codes.shape[0]
    a, b = (layout.spread(f, layers, depth) for f in form[:2])
    if form.gain is None:
        return Factors(a, b)
    return Factors(a, b, layout.spread(form.gain, layers, depth, fill=1.0))
