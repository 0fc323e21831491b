"""Small adapters of every kind, and their updates computed in numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

import lorax
from tests.programs import normal


def axes_of(in_, out, batch):
    """Axes of a leaf `[*batch, *in, *out]`."""
    n, i, o = len(batch), len(in_), len(out)
    places = iter(range(n + i + o))
    first = tuple(next(places) for _ in range(n))
    read = tuple(next(places) for _ in range(i))
    return lorax.Axes(read, tuple(places), first)


def lora(seed, rank=2, scale=1.5, in_=(6,), out=(5,), batch=(), **static) -> Any:
    a = normal(seed, *batch, *in_, rank) / 2
    b = normal(seed + 1000, *batch, rank, *out) / 2
    return lorax.Lora(a, b, scale, axes_of(in_, out, batch), **static)


def adalora(seed, rank=2, scale=1.5, in_=(6,), out=(5,), batch=(), **static) -> Any:
    plain = lora(seed, rank, scale, in_, out, batch)
    lam = normal(seed + 2000, *batch, rank)
    return lorax.AdaLora(plain.a, lam, plain.b, scale, plain.axes, **static)


def dora(seed, rank=2, scale=1.5, in_=(6,), out=(5,), batch=(), **static) -> Any:
    plain = lora(seed, rank, scale, in_, out, batch)
    magnitude = abs(normal(seed + 3000, *batch, *out)) + 0.5
    return lorax.Dora(plain.a, plain.b, magnitude, scale, plain.axes, **static)


def delta(adapter) -> np.ndarray:
    """`scale * a @ b` (AdaLora: `scale * p @ diag(lam) @ q`), `[*batch, *in, *out]`."""
    ada = isinstance(adapter, lorax.AdaLora)
    a, b = (adapter.p, adapter.q) if ada else (adapter.a, adapter.b)
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    n, rank = len(adapter.axes.batch), a.shape[-1]
    batch, in_, out = a.shape[:n], a.shape[n:-1], b.shape[n + 1 :]
    a = a.reshape(*batch, math.prod(in_), rank)
    b = b.reshape(*batch, rank, math.prod(out))
    if ada:
        a = a * np.asarray(adapter.lam, np.float64)[..., None, :]
    return adapter.scale * (a @ b).reshape(*batch, *in_, *out)


def close(got, want, tolerance=1e-5):
    """Asserts that entries agree, relative to the largest."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * max(np.abs(want).max(), 1e-3)
