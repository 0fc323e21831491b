"""A leaf that keeps the codes of its tensors."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np

from lorax.interop.gguf import blocks
from lorax.interop.gguf.tensors import Tensor
from lorax.quantized import Quantized
from lorax.quantized.formats import block_of
from lorax.types import Axes


@dataclasses.dataclass(frozen=True)
class Coded:
    """The tensors of one leaf, and how their codes lie in it.

    Layers of one four-bit type keep four bits. Where the types of a stack differ, as in
    files that give every other layer more bits, all layers have int8 codes, and scales
    for the smallest of their tiles: more bytes than in the file, and the same weights.

    Attributes:
      parts: a tensor for each layer, or one alone; `[out, in]` each.
      shape: of the leaf.
      inputs: how many of its axes are inputs; those of outputs follow.
      stacked: the first axis numbers the layers.
      dtype: of the kernel that stands for the codes.
    """

    parts: tuple[Tensor, ...]
    shape: tuple[int, ...]
    inputs: int
    stacked: bool
    dtype: Any

    @property
    def abstract(self) -> Quantized:
        """The leaf, with shapes in place of arrays."""
        own = Axes(*(tuple(range(*span)) for span in self._spans))
        inputs, outputs, batch = own.sizes(self.shape)
        counts = (*batch, *inputs[:-1], inputs[-1] // self._tile, *outputs)
        stored = (*batch, *inputs, *outputs)
        block = block_of(stored, counts, own) if self._fours else 0
        if block:
            stored = (*batch, *inputs[:-1], inputs[-1] // 2, *outputs)
        shape: Any = jax.ShapeDtypeStruct
        tiles = functools.partial(shape, counts)
        signed = all(form.signed for form in self._forms)
        return Quantized(
            shape(stored, np.uint8 if block else np.int8),
            tiles(self._scale),
            zeros=None if signed or not block else tiles(np.int8),
            shifts=None if signed else tiles(self._scale),
            axes=own,
            block=block,
            dtype=np.dtype(self.dtype),
        )

    def read(self, shardings: Quantized | jax.sharding.Sharding) -> Quantized:
        """Returns the leaf, of which every array lies as `shardings` say.

        Raises:
          ValueError: a file that ended early, or scales that are NaN or infinite.
        """
        leaf = self.abstract
        whole = jax.tree.map(lambda like: np.empty(like.shape, like.dtype), leaf)
        for i, part in enumerate(self.parts):
            own = jax.tree.leaves(self._layer(part, leaf))
            for array, layer in zip(jax.tree.leaves(whole), own, strict=True):
                place = array[i] if self.stacked else array
                place[...] = layer.reshape(place.shape)
        if isinstance(shardings, jax.sharding.Sharding):
            shardings = jax.tree.map(lambda _: shardings, leaf)
        return jax.tree.map(_placed, whole, shardings)

    def _layer(self, part: Tensor, leaf: Quantized) -> Quantized:
        """The arrays of one tensor, inputs first."""
        found, form = part.unpack(), blocks.FORMS[part.stored.kind]
        spread = functools.partial(np.repeat, repeats=form.tile // self._tile, axis=1)
        codes: Any = found.codes
        scales = spread(found.scales)
        own: dict[str, Any] = {"scales": scales}
        if leaf.shifts is not None:
            none = found.shifts is None
            own["shifts"] = np.zeros_like(scales) if none else spread(found.shifts)
        if leaf.zeros is not None:  # four bits with a sign stand for 0 to 15
            own["zeros"] = np.full_like(scales, -8)
            codes = codes - np.int8(8)
        if leaf.block:
            nibbles = codes.view(np.uint8) & 15
            pairs = nibbles.reshape(len(codes), -1, 2, leaf.block // 2)
            codes = (pairs[:, :, 0] << 4 | pairs[:, :, 1]).reshape(len(codes), -1)
        arrays = dataclasses.replace(leaf, codes=codes, **own)
        return jax.tree.map(np.transpose, arrays)

    @property
    def _forms(self) -> list[blocks.Form]:
        return [blocks.FORMS[part.stored.kind] for part in self.parts]

    @property
    def _fours(self) -> bool:
        """True where codes share bytes."""
        kinds = {part.stored.kind for part in self.parts}
        return len(kinds) == 1 and self._forms[0].bits == 4 and self._tile % 2 == 0

    @property
    def _tile(self) -> int:
        """Inputs that share a scale: neighbours along the last input axis."""
        last = self.shape[self._spans[0][1] - 1]
        return math.gcd(last, *(form.tile for form in self._forms))

    @property
    def _scale(self) -> np.dtype:
        """The dtype of scales and shifts."""
        small = all(not part.stored.kind.name.endswith("_K") for part in self.parts)
        return np.dtype(np.float16 if small else np.float32)

    @property
    def _spans(self) -> tuple[tuple[int, int], ...]:
        """Inputs, outputs and layers in the axes of the leaf."""
        first = int(self.stacked)
        last = first + self.inputs
        return (first, last), (last, len(self.shape)), (0, first)


def _placed(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(
        array.shape, sharding, lambda index: array[index]
    )
