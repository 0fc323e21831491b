"""Unpacks ggml's blocks into integer codes with scales and shifts.

    W = code * scale + shift            for 16 or 32 neighbours along a row

| type | codes | scale | shift |
|---|---|---|---|
| Q4_0, Q5_0, Q8_0 | around zero | d | |
| Q4_1, Q5_1 | from 0 | d | m |
| Q4_K, Q5_K | from 0 | d * six bits | -dmin * six bits |
| Q6_K | around zero | d * eight bits | |

d, m and dmin are float16: the products fit into float32, so nothing is lost.

References:
  ggml-common.h and ggml-quants.c of ggml-org/ggml.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import gguf
import numpy as np

Type = gguf.GGMLQuantizationType


class Blocks(NamedTuple):
    """Some rows of a matrix.

    Attributes:
      codes: int8 `[rows, inputs]`.
      scales: `[rows, inputs / tile]`, float16, or float32 for products of two numbers.
      shifts: likewise; None for 0.
    """

    codes: np.ndarray
    scales: np.ndarray
    shifts: np.ndarray | None = None


class Form(NamedTuple):
    """How a type stores its weights.

    Attributes:
      bits: bits per code.
      tile: number of neighbours that share a scale.
      take: converts `[blocks, bytes]` to `Blocks`, with a row for each block.
      signed: True if codes are around zero, False if they start at zero.
      wide: whether scales are products of two numbers, in float32.
    """

    bits: int
    tile: int
    take: Callable[[np.ndarray], Blocks]
    signed: bool = False
    wide: bool = False


def unpack(kind: Type, rows: np.ndarray) -> Blocks:
    """Unpacks `rows`, `[rows, bytes]`; `kind` is one of `FORMS`."""
    _, size = gguf.GGML_QUANT_SIZES[kind]
    found = FORMS[kind].take(rows.reshape(-1, size))
    shape = rows.shape[0], -1
    shifts = None if found.shifts is None else found.shifts.reshape(shape)
    return Blocks(found.codes.reshape(shape), found.scales.reshape(shape), shifts)


def _halves(raw: np.ndarray) -> np.ndarray:
    """Two codes per byte; the lower bits are the first half of the block."""
    return np.concatenate([raw & 15, raw >> 4], axis=-1).astype(np.int8)


def _float16(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view("<f2")


def _q4_0(raw: np.ndarray) -> Blocks:
    d, codes = np.split(raw, [2], axis=1)
    return Blocks(_halves(codes) - np.int8(8), _float16(d))


def _q4_1(raw: np.ndarray) -> Blocks:
    d, m, codes = np.split(raw, [2, 4], axis=1)
    return Blocks(_halves(codes), _float16(d), _float16(m))


def _fifth(raw: np.ndarray) -> np.ndarray:
    """The fifth bit of 32 codes, as 0 or 16."""
    return np.unpackbits(raw, axis=1, bitorder="little").astype(np.int8) << 4


def _q5_0(raw: np.ndarray) -> Blocks:
    d, high, codes = np.split(raw, [2, 6], axis=1)
    return Blocks((_halves(codes) | _fifth(high)) - np.int8(16), _float16(d))


def _q5_1(raw: np.ndarray) -> Blocks:
    d, m, high, codes = np.split(raw, [2, 4, 8], axis=1)
    return Blocks(_halves(codes) | _fifth(high), _float16(d), _float16(m))


def _q8_0(raw: np.ndarray) -> Blocks:
    d, codes = np.split(raw, [2], axis=1)
    return Blocks(codes.view(np.int8), _float16(d))


def _six_bits(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and minima of the eight tiles of a K block, from twelve bytes.

    The lower six bits of bytes 0-3 hold scales 0-3, those of bytes 4-7 minima 0-3.
    Bytes 8-11 hold the lower four bits of scales 4-7 in their lower half and those of
    minima 4-7 in their upper half; the remaining two bits of each are the top bits of
    bytes 0-3 (scales) and 4-7 (minima).
    """
    first, second, both = np.split(raw, [4, 8], axis=1)
    scales = np.concatenate([first & 63, both & 15 | first >> 6 << 4], axis=1)
    minima = np.concatenate([second & 63, both >> 4 | second >> 6 << 4], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _k_tiles(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and shifts of a Q4_K or Q5_K block, from its first sixteen bytes."""
    scales, minima = _six_bits(raw[:, 4:16])
    d, dmin = (_float16(raw[:, i : i + 2]).astype(np.float32) for i in (0, 2))
    return d * scales, -(dmin * minima)


def _k_codes(raw: np.ndarray) -> np.ndarray:
    """`[blocks, 8, 32]`: for every 32 bytes, first the lower bits, then the upper."""
    return _halves(raw.reshape(len(raw), 4, 32)).reshape(-1, 8, 32)


def _q4_k(raw: np.ndarray) -> Blocks:
    return Blocks(_k_codes(raw[:, 16:]), *_k_tiles(raw))


def _q5_k(raw: np.ndarray) -> Blocks:
    high, codes = np.split(raw[:, 16:], [32], axis=1)
    bits = high[:, None] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return Blocks(_k_codes(codes) | bits.astype(np.int8) << 4, *_k_tiles(raw))


def _q6_k(raw: np.ndarray) -> Blocks:
    low, high, scales, d = np.split(raw, [128, 192, 208], axis=1)
    low = low.reshape(-1, 2, 64)
    low = np.concatenate([low & 15, low >> 4], axis=2)  # [blocks, 2, 128]
    pairs = high.reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    codes = low | (pairs & 3).reshape(-1, 2, 128) << 4
    tiles = _float16(d).astype(np.float32) * scales.view(np.int8).astype(np.float32)
    return Blocks(codes.astype(np.int8) - np.int8(32), tiles)


FORMS = {
    Type.Q4_0: Form(4, 32, _q4_0, signed=True),
    Type.Q4_1: Form(4, 32, _q4_1),
    Type.Q5_0: Form(5, 32, _q5_0, signed=True),
    Type.Q5_1: Form(5, 32, _q5_1),
    Type.Q8_0: Form(8, 32, _q8_0, signed=True),
    Type.Q4_K: Form(4, 32, _q4_k, wide=True),
    Type.Q5_K: Form(5, 32, _q5_k, wide=True),
    Type.Q6_K: Form(6, 16, _q6_k, signed=True, wide=True),
}
"""The types whose codes can be kept; other types are decoded."""
