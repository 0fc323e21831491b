"""Experts in MXFP4, as in GPT-OSS's checkpoints, loaded without decoding.

    W[e, i, o] = value(code) 2^(s - 127),   32 inputs of an output share the scale s

`X_blocks` is uint8 `[experts, out, in / 32, 16]`, the first of two codes in the lower
bits; `X_scales` is uint8 `[experts, out, in / 32]`; X is `[experts, in, out]`.

References:
  Open Compute Project, Microscaling Formats (MX) specification 1.0, 2023.
  OpenAI, gpt-oss-120b & gpt-oss-20b Model Card, arXiv:2508.10925.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax.interop import files, packed
from lorax.models import table
from lorax.quantized import Quantized
from lorax.quantized import leaf as quantized_leaf
from lorax.types import Axes

BLOCK = 32
BOOK = "mxfp4"
SORTED = np.array([*range(7, 15), *range(7, -1, -1)], np.uint8)
"""Our code (in ascending order of values) for each of theirs (fourth bit: the sign)."""

BLOCKS, SCALES = "_blocks", "_scales"


@dataclasses.dataclass(frozen=True)
class Stack:
    """The kernels of all experts of a layer, on disk.

    Attributes:
      path: the file.
      key: the name that a dense tensor would have.
      shape: `[experts, in, out]`.
      blocks: the codes.
      scales: the exponents.
    """

    path: pathlib.Path
    key: str
    shape: tuple[int, ...]
    blocks: files.Tensor
    scales: files.Tensor

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the decoded weights, as in transformers."""
        return np.dtype(jnp.bfloat16)

    @property
    def nbytes(self) -> int:
        """The bytes of the codes."""
        return self.blocks.nbytes

    def codes(self) -> np.ndarray:
        """Returns our codes, uint8 `[experts, in, out]`."""
        pairs = np.asarray(self.blocks.read())
        codes = SORTED[np.stack([pairs & 15, pairs >> 4], axis=-1)]
        experts, inputs, outputs = self.shape
        return codes.reshape(experts, outputs, inputs).swapaxes(1, 2)

    def factors(self) -> np.ndarray:
        """Returns the scales, float32 `[experts, in / 32, out]`."""
        exponents = np.asarray(self.scales.read()).astype(np.int32) - 127
        return np.ldexp(np.float32(1), exponents).swapaxes(1, 2)


class Plan(NamedTuple):
    """How to read one leaf.

    Attributes:
      parts: the stack of each layer, or a single one, and where it goes.
      shape: the leaf's shape.
    """

    parts: Sequence[tuple[Stack, table.Location]]
    shape: tuple[int, ...]

    @property
    def stacked(self) -> bool:
        """Whether the first axis indexes the layers."""
        return self.parts[0][1].layer is not None

    @property
    def abstract(self) -> Quantized:
        """The leaf, with shapes in place of arrays."""
        at = self.stacked + 1  # behind layers and experts
        front, inputs, outputs = self.shape[:at], self.shape[at], self.shape[at + 1 :]

        def like(size: int, dtype: Any) -> Any:
            return jax.ShapeDtypeStruct((*front, size, *outputs), dtype)

        codes, scales = like(inputs // 2, jnp.uint8), like(inputs // BLOCK, jnp.float32)
        return self._leaf(codes, scales, len(self.shape), at)

    def read(self, where: Any) -> Quantized:
        """Returns the leaf; see `packed.assembled`."""
        return packed.assembled(self.abstract, self._layers(), self.stacked, where)

    def _layers(self) -> Iterator[Quantized]:
        experts, inputs, *outputs = self.shape[self.stacked :]
        for stack, place in self.parts:
            shape = experts, inputs, *outputs
            codes = table.from_disk(stack.codes(), shape, place.entry)
            shape = experts, inputs // BLOCK, *outputs
            scales = table.from_disk(stack.factors(), shape, place.entry)
            pairs = quantized_leaf.packed(jnp.asarray(codes), 1, BLOCK)
            yield self._leaf(pairs, scales, codes.ndim, 1)

    def _leaf(self, codes: Any, scales: Any, ndim: int, at: int) -> Quantized:
        axes = Axes((at,), tuple(range(at + 1, ndim)), tuple(range(at)))
        return Quantized(
            codes, scales, axes=axes, block=BLOCK, codebook=BOOK, dtype=jnp.bfloat16
        )


def gathered(
    tensors: Mapping[str, files.Tensor], raw: Mapping[str, Any]
) -> dict[str, files.Tensor | Stack] | None:
    """Returns a checkpoint's tensors, codes and scales as one; None if not MXFP4.

    Args:
      tensors: as in the files.
      raw: config.json, whose `quantization_config` names the method.

    Raises:
      ValueError: codes lack scales, or have other shapes; the message names the key.
    """
    told = raw.get("quantization_config")
    if not isinstance(told, Mapping) or told.get("quant_method") != BOOK:
        return None
    found: dict[str, files.Tensor | Stack] = dict(tensors)
    for key, blocks in tensors.items():
        name = key.removesuffix(BLOCKS)
        if name == key:
            continue
        scales = tensors.get(name + SCALES)
        where = f"{blocks.path.name}: {key!r}"
        if scales is None:
            raise ValueError(f"{where}: its scales {name + SCALES!r} are missing")
        _require(blocks, scales, where)
        experts, outputs, count, _ = blocks.shape
        shape = experts, count * BLOCK, outputs
        found[name] = Stack(blocks.path, name, shape, blocks, scales)
        del found[key], found[name + SCALES]
    if not any(isinstance(tensor, Stack) for tensor in found.values()):
        raise ValueError(
            "config.json: quantization_config says MXFP4, but no tensor is quantised"
        )
    return found


def _require(blocks: files.Tensor, scales: files.Tensor, where: str) -> None:
    kinds = {str(tensor.dtype) for tensor in (blocks, scales)}
    fits = len(blocks.shape) == 4 and blocks.shape[-1] == BLOCK // 2
    if kinds != {"uint8"} or not fits or blocks.shape[:-1] != scales.shape:
        raise ValueError(
            f"{where} has shape {list(blocks.shape)} and its scales "
            f"{list(scales.shape)}; both must be uint8, of shapes [experts, out, in / "
            "32, 16] and [experts, out, in / 32]"
        )


def plans(
    found: Mapping[str, Sequence[tuple[Any, table.Location]]], shapes: Mapping[str, Any]
) -> dict[str, Plan]:
    """Returns plans for the leaves whose tensors are in MXFP4, by path.

    Raises:
      ValueError: some layers of a stack are quantised and others are not.
    """
    made = {}
    for path, parts in found.items():
        coded = [isinstance(tensor, Stack) for tensor, _ in parts]
        if not any(coded):
            continue
        if not all(coded):
            raise ValueError(
                f"{parts[coded.index(False)][0].key!r} is dense, but other layers of "
                "the leaf are quantised; load with scan=False"
            )
        made[path] = Plan(parts, shapes[path].shape)
    return made
