"""Between the factors of single modules, as on disk, and adapters of whole leaves.

Torch keeps `A: [rank, in]` and `B: [out, rank]`, so that `a = A^T` and `b = B^T`, for
linear maps, `Conv1D` and embeddings alike. A leaf that stacks its layers has one module
for each; ranks that differ among them are padded with zeros in every factor, and scales
that differ are folded into b (AdaLoRA: lam), both of which change no update. Such
padding is cut off again before anything is written.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax.adapters import AdaLora, Dora, Lora
from lorax.compose import forms
from lorax.models import table
from lorax.types import Axes


@dataclasses.dataclass(frozen=True)
class Module:
    """The factors of one module.

    Attributes:
      name: of the module on disk, without `.weight`.
      a: `[in, rank]`; of AdaLoRA p.
      b: `[rank, out]`; of AdaLoRA q.
      scale: the factor on their product.
      lam: `[rank]` of AdaLoRA, else None.
      magnitude: `[out]` of DoRA, else None.
    """

    name: str
    a: np.ndarray
    b: np.ndarray
    scale: float
    lam: np.ndarray | None = None
    magnitude: np.ndarray | None = None


def axes_of(entry: table.Entry, stacked: bool) -> Axes:
    """Returns which axes of a leaf are read and written, of a stack behind axis 0."""
    first = int(stacked)
    last = first + len(entry.axes)
    middle = first + entry.inputs
    return Axes(
        tuple(range(first, middle)), tuple(range(middle, last)), tuple(range(first))
    )


def joined(
    modules: Sequence[tuple[int | None, Module]],
    entry: table.Entry,
    shape: tuple[int, ...],
    dropout: float = 0.0,
) -> Lora | Dora | AdaLora:
    """Returns one adapter.

    Args:
      modules: of the leaf, each with its layer; None: the leaf is no stack.
      entry: of the leaf.
      shape: of the leaf.
      dropout: static field of the adapter.

    Returns:
      The adapter, float32; `layers` names those that have factors, if not all do.
    """
    numbers = [layer for layer, _ in modules]
    stacked = numbers[0] is not None
    axes = axes_of(entry, stacked)
    in_, out, _ = axes.sizes(shape)
    own = sorted(modules, key=lambda pair: pair[0] or 0)
    each = [module for _, module in own]
    scale = next((m.scale for m in each if m.scale), 0.0)
    rank = max(m.a.shape[1] for m in each)
    shared = [_rescaled(m, scale) for m in each]
    put = lambda arrays, tail: _put(arrays, tail, stacked)
    a = put([_padded(m.a, rank, 1) for m in shared], (*in_, rank))
    b = put([_padded(m.b, rank, 0) for m in shared], (rank, *out))
    layers = tuple(layer for layer, _ in own if layer is not None)
    every = not stacked or layers == tuple(range(shape[0]))
    static = (scale, axes, dropout, None if every else layers)
    if each[0].lam is not None:
        lam = put([_padded(_given(m.lam), rank, 0) for m in shared], (rank,))
        return AdaLora(a, lam, b, *static)
    if each[0].magnitude is not None:
        return Dora(a, b, put([_given(m.magnitude) for m in each], out), *static)
    return Lora(a, b, *static)


def split(adapter: Any, names: Sequence[str]) -> list[Module]:
    """Returns the modules of an adapter, without ranks that are zero in every factor.

    Args:
      adapter: a Lora, Dora or AdaLora.
      names: of the module of every layer that has factors.
    """
    first, last = forms.factor_names(adapter)
    n, rank = len(names), adapter.rank
    flat = lambda name, *tail: np.asarray(
        jax.device_get(getattr(adapter, name)), np.float32
    ).reshape(n, *tail)
    a, b = flat(first, -1, rank), flat(last, rank, -1)
    lam = flat("lam", rank) if "lam" in adapter.roles else None
    magnitude = flat("magnitude", -1) if "magnitude" in adapter.roles else None
    found = []
    for i, name in enumerate(names):
        used = a[i].any(0) | b[i].any(1)
        if lam is not None:
            used |= lam[i] != 0
        elif not used.any():
            used[0] = True  # only AdaLoRA knows rank 0
        found.append(
            Module(
                name,
                a[i][:, used],
                b[i][used],
                float(adapter.scale),
                None if lam is None else lam[i][used],
                None if magnitude is None else magnitude[i],
            )
        )
    return found


def one_scale(modules: Sequence[Module]) -> list[Module]:
    """Returns the same updates with one positive scale."""
    scale = next((abs(m.scale) for m in modules if m.scale), 1.0)
    return [dataclasses.replace(_rescaled(m, scale), scale=scale) for m in modules]


def mirrored(module: Module, name: str) -> Module:
    """Returns a module's factors for the transposed matrix: an embedding's tied head.

    Args:
      module: without magnitude.
      name: of the other module.
    """
    return dataclasses.replace(module, name=name, a=module.b.T, b=module.a.T)


def _given(array: np.ndarray | None) -> np.ndarray:
    assert array is not None
    return array


def _rescaled(module: Module, scale: float) -> Module:
    if module.scale == scale:
        return module
    if module.lam is not None:
        return dataclasses.replace(module, lam=_times(module.lam, module.scale / scale))
    return dataclasses.replace(module, b=_times(module.b, module.scale / scale))


def _times(array: np.ndarray, ratio: float) -> np.ndarray:
    return (array.astype(np.float64) * ratio).astype(np.float32)


def _padded(array: np.ndarray, rank: int, axis: int) -> np.ndarray:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, rank - array.shape[axis])
    return np.pad(array, widths)


def _put(
    arrays: Sequence[np.ndarray], tail: tuple[int, ...], stacked: bool
) -> jax.Array:
    whole = np.stack([array.reshape(tail) for array in arrays])
    assert whole.size == len(arrays) * math.prod(tail)
    return jnp.asarray(whole if stacked else whole[0], jnp.float32)
