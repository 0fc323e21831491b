"""Adapters of every form for random kernels, drawn with numpy.

A kernel is described by `dims`: the kind ("in", "out", "batch") and the size of each
dimension.
"""

import math

import jax
import numpy as np

import lorax
from lorax.adapters import Hra, Ia3, LoKr, Oft, lokr

PLAIN = ["lora", "lora"]  # one per leaf


def adapter_of(dims, rank, seed):
    of = lambda kind: tuple(d for d, (k, _) in enumerate(dims) if k == kind)
    axes = lorax.Axes(of("in"), of("out"), of("batch"))
    in_, out, batch = axes.sizes(tuple(size for _, size in dims))
    draw = np.random.RandomState(seed).randn
    return lorax.Lora(
        jax.device_put(draw(*batch, *in_, rank)),
        jax.device_put(draw(*batch, rank, *out)),
        0.5,
        axes,
    )


def arrays_of(kind, in_, out, draw):
    """The arrays of one kernel's adapter, with in and out axes flattened or not."""
    n, m = math.prod(in_), math.prod(out)
    near_one = lambda *shape: 1 + 0.3 * draw(*shape)
    if kind == "hra":
        return {"u": draw(*in_, 2)}
    if kind == "oft":
        return {"skew": 0.3 * draw(n // 2, 1)}
    if kind == "lokr":
        (p, q), (k, o) = lokr.split(n, -1), lokr.split(m, -1)
        return {"w1": draw(p, k), "w2_a": draw(q, 1), "w2_b": draw(1, o)}
    if kind == "ia3":
        return {"gain": near_one(*out)}
    if kind == "ia3 on both":
        return {"gain": near_one(*out), "input_gain": near_one(*in_)}
    return {"a": draw(*in_, 2), "b": draw(2, *out), "magnitude": near_one(*out)}


FORMS = {
    "hra": lambda arrays, axes: Hra(**arrays, axes=axes),
    "oft": lambda arrays, axes: Oft(**arrays, axes=axes, cayley_terms=None),
    "lokr": lambda arrays, axes: LoKr(0.5, axes, **arrays),
    "ia3": lambda arrays, axes: Ia3(axes, **arrays),
    "ia3 on both": lambda arrays, axes: Ia3(axes, **arrays),
    "dora": lambda arrays, axes: lorax.Dora(**arrays, scale=0.5, axes=axes),
}
"""Forms besides the thin product: maps of inputs, a structured branch, gains."""


def made(kind, dims, rank, seed):
    """An adapter of any form, with its arrays stacked over the batch axes."""
    plain = adapter_of(dims, rank, seed)
    if kind == "lora":
        return plain
    in_, out, batch = plain.axes.sizes(tuple(size for _, size in dims))
    draw = np.random.RandomState(seed).randn
    each = [arrays_of(kind, in_, out, draw) for _ in range(math.prod(batch))]
    stack = lambda *x: jax.device_put(np.stack(x).reshape(*batch, *x[0].shape))
    return FORMS[kind](jax.tree.map(stack, *each), plain.axes)
