"""Tensors of a GGUF file, to be read as a model's leaves: decoded, or as codes."""

from __future__ import annotations

from typing import Any, NamedTuple

import gguf
import numpy as np

from lorax.interop import files
from lorax.interop.gguf import blocks, header


class Tensor(NamedTuple):
    """One tensor of a model, with the interface of `lorax.interop.files.Tensor`.

    Attributes:
      stored: the tensor on disk.
      dtype: the dtype of what `read` returns.
      heads: if not 0, rows are in llama.cpp's order for so many heads.
    """

    stored: header.Stored
    dtype: np.dtype
    heads: int = 0

    @classmethod
    def of(cls, stored: header.Stored, decoded: Any, heads: int = 0) -> Tensor:
        """Returns a tensor; codes are decoded to the dtype `decoded`.

        Raises:
          ValueError: its type is not supported.
        """
        raw, kind = stored.raw, stored.kind
        if kind in header.FLOATS:
            return cls(stored, raw.dtype, heads)
        if kind not in blocks.FORMS and kind not in DECODED:
            raise ValueError(
                f"{raw.path}: {raw.key!r} has the ggml type {kind.name}, which is not "
                "supported; convert it with llama-quantize, for example to Q8_0"
            )
        return cls(stored, np.dtype(decoded), heads)

    @property
    def shape(self) -> tuple[int, ...]:
        """`[out, in]` or `[size]`."""
        return self.stored.shape

    def read(self, rows: slice = slice(None)) -> np.ndarray:
        """Returns the tensor, or some of its rows.

        Raises:
          ValueError: the file ends early, or a value is NaN or infinite.
        """
        if self.heads:  # a layer's queries or keys: their rows are not contiguous
            return unturned(self._rows(slice(None)), self.heads)[rows]
        return self._rows(rows)

    def read_block(self, rows: slice, columns: slice) -> np.ndarray:
        """Returns a block of a matrix."""
        return self.read(rows)[:, columns]

    def unpack(self) -> blocks.Blocks:
        """Returns the codes of a matrix, with their scales and shifts.

        Raises:
          ValueError: the file ends early, or a scale is NaN or infinite.
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
        with np.errstate(all="ignore"):  # overflow is detected below
            found = gguf.quants.dequantize(raw.read(rows), kind)
        if not files.is_finite(found):
            raise ValueError(f"{raw.path}: {raw.key!r} holds NaN or infinite values")
        return found.astype(self.dtype, copy=False)


DECODED = frozenset(
    kind
    for kind in blocks.Type
    if kind.name.startswith(("Q2_K", "Q3_K", "IQ", "TQ", "MXFP4"))
)
"""Types that can only be decoded."""


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
