"""Tensors of a GGUF file as a model's leaves: decoded, or taken apart."""

from __future__ import annotations

from typing import Any, NamedTuple

import gguf
import numpy as np

from lorax.interop import files
from lorax.interop.gguf import blocks, header


class Tensor(NamedTuple):
    """One tensor of a model; read as `lorax.interop.files.Tensor` is.

    Attributes:
      stored: where it lies.
      dtype: of what is read.
      heads: rows lie as llama.cpp turns them, for so many heads; 0: they do not.
    """

    stored: header.Stored
    dtype: np.dtype
    heads: int = 0

    @classmethod
    def of(cls, stored: header.Stored, decoded: Any, heads: int = 0) -> Tensor:
        """Returns a tensor; codes are decoded to the dtype `decoded`.

        Raises:
          ValueError: a type that cannot be read.
        """
        raw, kind = stored.raw, stored.kind
        if kind in header.FLOATS:
            return cls(stored, raw.dtype, heads)
        if kind not in blocks.FORMS and kind not in DECODED:
            raise ValueError(
                f"{raw.path}: {raw.key!r} has the ggml type {kind.name}, which is not "
                "read; convert it with llama-quantize, such as to Q8_0"
            )
        return cls(stored, np.dtype(decoded), heads)

    @property
    def shape(self) -> tuple[int, ...]:
        """`[out, in]` or `[size]`."""
        return self.stored.shape

    def read(self, rows: slice = slice(None)) -> np.ndarray:
        """Returns the tensor, or those of its rows.

        Raises:
          ValueError: the file ended early, or a value is NaN or infinite.
        """
        if self.heads:  # a layer's queries or keys: their rows lie apart
            return unturned(self._rows(slice(None)), self.heads)[rows]
        return self._rows(rows)

    def read_block(self, rows: slice, columns: slice) -> np.ndarray:
        """Returns a block of a matrix."""
        return self.read(rows)[:, columns]

    def unpack(self) -> blocks.Blocks:
        """Returns the codes of a matrix, and what makes weights of them.

        Raises:
          ValueError: the file ended early, or a scale is NaN or infinite.
        """
        raw = self.stored.raw
        found = blocks.unpack(self.stored.kind, raw.read())
        if not all(files.is_finite(part) for part in found[1:] if part is not None):
            raise ValueError(f"{raw.path}: {raw.key!r} holds NaN or infinite scales")
        if not self.heads:
            return found
        shifts = found.shifts
        return blocks.Blocks(
            unturned(found.codes, self.heads),
            unturned(found.scales, self.heads),
            None if shifts is None else unturned(shifts, self.heads),
        )

    def _rows(self, rows: slice) -> np.ndarray:
        raw, kind = self.stored.raw, self.stored.kind
        if kind in header.FLOATS:
            return raw.read(rows)
        with np.errstate(all="ignore"):  # what overflows is found below
            found = gguf.quants.dequantize(raw.read(rows), kind)
        if not files.is_finite(found):
            raise ValueError(f"{raw.path}: {raw.key!r} holds NaN or infinite values")
        return found.astype(self.dtype, copy=False)


DECODED = frozenset(
    kind
    for kind in blocks.Type
    if kind.name.startswith(("Q2_K", "Q3_K", "IQ", "TQ", "MXFP4"))
)
"""Types that are read by decoding alone."""


def unturned(rows: np.ndarray, heads: int) -> np.ndarray:
    """Returns rows of queries or keys in Hugging Face's order.

    llama.cpp rotates neighbours `(x_2i, x_2i+1)`, Hugging Face `(x_i, x_i+d/2)`.
    """
    split = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def turned(rows: np.ndarray, heads: int) -> np.ndarray:
    """Returns rows of queries or keys in llama.cpp's order; undoes `unturned`."""
    split = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)
