"""Converts between arrays of single modules, as on disk, and adapters of whole leaves.

A leaf that stacks its layers has one module per layer but a single adapter; the words
of `Field.dims` give the axes of its arrays. If ranks differ among the layers, every
factor is padded with zeros; if scales differ, they are folded into one field (LoRA's
b). Neither changes an update. The padding is removed again before writing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax.models import table
from lorax.types import Axes

LEAF = ("axes", "dropout", "layers", "moved_by", "in_sizes", "out_sizes")
"""Static fields that belong to a leaf's adapter; the others belong to a module."""


@dataclasses.dataclass(frozen=True)
class Module:
    """One torch module's part of an adapter.

    Attributes:
      name: the module's name on disk, without `.weight`.
      cls: the parametrisation.
      fields: its trained arrays by name, one axis for every word of `Field.dims` except
        "batch": LoRA's a is `[in, rank]`.
      statics: the static fields that belong to the module, such as `scale`.
    """

    name: str
    cls: Any
    fields: Mapping[str, np.ndarray]
    statics: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def scale(self) -> float:
        """The factor on the update; 1 for a class that has none."""
        return self.statics.get("scale", 1.0)

    @property
    def empty(self) -> bool:
        """True if rank allocation left no rank."""
        return self.cls.padded and bool(_ranks(self.cls)) and not self.rank

    @property
    def rank(self) -> int:
        """The width of the bottleneck; 0 for a class that has none."""
        own = ((n, axis) for n, axis in _ranks(self.cls) if n in self.fields)
        return next((self.fields[n].shape[axis] for n, axis in own), 0)


def _ranks(cls: Any) -> list[tuple[str, int]]:
    """The fields that have a rank, and its axis in a module's array."""
    own = {name: _own(field.words) for name, field in cls.fields.items()}
    return [(n, w.index("rank")) for n, w in own.items() if "rank" in w]


def _own(words: Sequence[str]) -> list[str]:
    return [word for word in words if word != "batch"]


def axes_of(entry: table.Entry, stacked: bool) -> Axes:
    """Returns a leaf's input and output axes; if `stacked`, axis 0 is the layers'."""
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
) -> Any:
    """Joins the modules of a leaf into one adapter.

    Args:
      modules: of the leaf, each with its layer; None if the leaf is not a stack.
      entry: the leaf's entry.
      shape: the leaf's shape.
      dropout: static field of the adapter.

    Returns:
      The adapter, float32; `layers` lists those that have factors, if not all do.

    Raises:
      ValueError: layers differ in something that an adapter has only once.
    """
    numbers = [layer for layer, _ in modules]
    stacked = numbers[0] is not None
    axes = axes_of(entry, stacked)
    in_, out, _ = axes.sizes(shape)
    own = sorted(modules, key=lambda pair: pair[0] or 0)
    each = alike([module for _, module in own])
    layers = tuple(layer for layer, _ in own if layer is not None)
    every = not stacked or layers == tuple(range(shape[0]))
    cls, tails = each[0].cls, {"in": in_, "out": out}
    arrays = {}
    for name in each[0].fields:
        words = _own(cls.fields[name].words)
        sizes = zip(words, each[0].fields[name].shape, strict=True)
        tail = [n for word, size in sizes for n in tails.get(word, (size,))]
        arrays[name] = _put([m.fields[name] for m in each], tail, stacked)
    leaf = {
        "axes": axes,
        "dropout": dropout,
        "layers": None if every else layers,
        "in_sizes": in_,
        "out_sizes": out,
    }
    known = {field.name for field in dataclasses.fields(cls)}
    leaf = {name: value for name, value in leaf.items() if name in known}
    return cls(**arrays, **leaf, **each[0].statics)


def alike(modules: Sequence[Module]) -> list[Module]:
    """Returns modules of one leaf at a common rank and scale; statics must agree."""
    first = modules[0]
    scale = next((m.scale for m in modules if m.scale), 0.0)
    rank = max(m.rank for m in modules)
    found = [_padded(_rescaled(m, scale), rank) for m in modules]
    for module in found:
        if module.statics != found[0].statics:
            raise ValueError(
                f"{first.name!r} has {dict(found[0].statics)} and {module.name!r} "
                f"{dict(module.statics)}, but the two are layers of one leaf here; "
                "load the base with scan=False"
            )
    return found


def split(adapter: Any, names: Sequence[str]) -> list[Module]:
    """Returns the modules of an adapter, without ranks that are zero in every factor.

    Args:
      adapter: of a class whose arrays have the kernel's axes, or axes of their own.
      names: the module of every layer that has factors.
    """
    cls, n = type(adapter), len(names)
    arrays = {name: _flat(adapter, name, n) for name in adapter.roles}
    fields = {f.name for f in dataclasses.fields(adapter)}
    statics = {
        name: getattr(adapter, name)
        for name in sorted(fields - set(cls.fields) - set(LEAF))
    }
    ranks = _ranks(cls) if adapter.padded else []
    found = []
    for i, name in enumerate(names):
        own = {field: array[i] for field, array in arrays.items()}
        used = [np.moveaxis(own[f] != 0, axis, 0) for f, axis in ranks]
        if used:
            rows = np.any([u.reshape(len(u), -1).any(1) for u in used], axis=0)
            if not rows.any() and not adapter.counts_ranks:
                rows[0] = True  # rank 0 only exists if ranks are allocated
            cut = {f: np.compress(rows, own[f], axis) for f, axis in ranks}
            own |= cut
        found.append(Module(name, cls, own, statics))
    return found


def _flat(adapter: Any, name: str, n: int) -> np.ndarray:
    """A field as `[n, ...]`, one axis for every word except "batch"."""
    array = np.asarray(jax.device_get(getattr(adapter, name)), np.float32)
    axes: Axes = adapter.axes
    lengths = {"batch": len(axes.batch), "in": len(axes.in_), "out": len(axes.out)}
    rest, sizes = list(array.shape), []
    for word in adapter.fields[name].words:
        count = lengths.get(word, 1)
        taken, rest = rest[:count], rest[count:]
        if word != "batch":
            sizes.append(math.prod(taken))
    return array.reshape(n, *sizes)


def one_scale(modules: Sequence[Module]) -> list[Module]:
    """Returns the same updates with a common positive scale."""
    scale = next((abs(m.scale) for m in modules if m.scale), 1.0)
    return [_rescaled(m, scale) for m in modules]


def mirrored(module: Module, name: str) -> Module:
    """Returns a module's factors for the transposed matrix: an embedding's tied head.

    Args:
      module: a module with Lora factors.
      name: the other module's name.
    """
    fields = {"a": module.fields["b"].T, "b": module.fields["a"].T}
    return dataclasses.replace(module, name=name, fields=fields)


def _rescaled(module: Module, scale: float) -> Module:
    """The same update at another scale; one field absorbs the ratio."""
    name = module.cls.absorbs
    if module.scale == scale or "scale" not in module.statics or name is None:
        return module
    times = module.fields[name].astype(np.float64) * (module.scale / scale)
    fields = {**module.fields, name: times.astype(np.float32)}
    statics = {**module.statics, "scale": scale}
    return dataclasses.replace(module, fields=fields, statics=statics)


def _padded(module: Module, rank: int) -> Module:
    if module.rank == rank:
        return module
    if not module.cls.padded:
        raise ValueError(
            f"{module.name!r} has rank {module.rank} and another layer of its leaf "
            f"rank {rank}, but padding would change what {module.cls.__name__} "
            "computes; load the base with scan=False"
        )
    fields = dict(module.fields)
    for name, axis in _ranks(module.cls):
        widths = [(0, 0)] * fields[name].ndim
        widths[axis] = (0, rank - fields[name].shape[axis])
        fields[name] = np.pad(fields[name], widths)
    return dataclasses.replace(module, fields=fields)


def _put(arrays: Sequence[np.ndarray], tail: Sequence[int], stacked: bool) -> jax.Array:
    whole = np.stack([array.reshape(tail) for array in arrays])
    assert whole.size == len(arrays) * math.prod(tail)
    return jnp.asarray(whole if stacked else whole[0], jnp.float32)
