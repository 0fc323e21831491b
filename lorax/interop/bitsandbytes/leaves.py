"""Leaves whose tensors were quantised by bitsandbytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lorax.interop import packed
from lorax.interop.bitsandbytes.matrices import Coded, is_coded
from lorax.models import table
from lorax.quantized import Quantized
from lorax.types import Axes


class Plan(NamedTuple):
    """How to read one leaf.

    Attributes:
      parts: a matrix for each layer, or a single one.
      shape: the leaf's shape.
      inputs: how many of its axes are inputs; the output axes follow them.
      stacked: whether the first axis indexes the layers.
    """

    parts: tuple[Coded, ...]
    shape: tuple[int, ...]
    inputs: int
    stacked: bool

    @property
    def abstract(self) -> Quantized:
        """The leaf, with shapes in place of arrays."""
        first, depth = self._layer(self.parts[0]), len(self.parts)

        def like(array: np.ndarray) -> Any:
            shape = (depth, *array.shape) if self.stacked else array.shape
            return jax.ShapeDtypeStruct(shape, array.dtype)

        last = len(self.shape)
        split = self.stacked + self.inputs
        groups = (self.stacked, split), (split, last), (0, self.stacked)
        axes = Axes(*(tuple(range(*group)) for group in groups))
        return jax.tree.map(like, dataclasses.replace(first, axes=axes))

    def read(self, where: Any) -> Quantized:
        """Returns the leaf; see `packed.assembled`."""
        return packed.assembled(self.abstract, self._layers(), self.stacked, where)

    def _layers(self) -> Iterator[Quantized]:
        first = self._layer(self.parts[0])
        for part in self.parts:
            layer = self._layer(part)
            if _form(layer) != _form(first):
                raise ValueError(
                    f"{part.path.name}: {part.key!r} is stored differently from "
                    f"{self.parts[0].key!r}, but the layers of a stack are one leaf; "
                    "load with scan=False"
                )
            yield layer

    def _layer(self, part: Coded) -> Quantized:
        sizes = self.shape[self.stacked :]
        return part.unpack(sizes[: self.inputs], sizes[self.inputs :])


def plans(
    found: Mapping[str, Sequence[tuple[Any, table.Location]]], shapes: Mapping[str, Any]
) -> dict[str, Plan]:
    """Returns plans for the leaves whose tensors are quantised, by path.

    Raises:
      ValueError: some layers of a stack are quantised and others are not; or single
        experts are quantised.
    """
    made = {}
    for path, parts in found.items():
        coded = tuple(tensor for tensor, _ in parts if is_coded(tensor))
        if not coded:
            continue
        if dense := [tensor.key for tensor, _ in parts if not is_coded(tensor)]:
            raise ValueError(
                f"{dense[0]!r} is dense and {coded[0].key!r} is quantised, but the "
                "layers of a stack are one leaf; load with scan=False"
            )
        place, shape = parts[0][1], shapes[path].shape
        if place.entry.part:
            raise ValueError(
                f"{coded[0].key!r} is quantised by itself, but all experts of a layer "
                "are one leaf here; load the checkpoint that is not quantised, with "
                'quantize="nf4"'
            )
        stacked = place.layer is not None
        made[path] = Plan(coded, shape, place.entry.inputs, stacked)
    return made


def _form(leaf: Quantized) -> tuple[Any, Any]:
    """What the layers of a stack share."""
    return jax.tree.structure(leaf), [x.shape for x in jax.tree.leaves(leaf)]
