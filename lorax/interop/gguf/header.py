"""Parses the header of an untrusted GGUF file: its metadata and tensor locations.

    magic, version, counts | key, type, value ... | name, dims, type, offset ... | data

Every count and length is checked against the remaining bytes before it is used, so that
no header can demand more time or memory than the size of the file warrants.

References:
  The GGUF specification, docs/gguf.md of ggml-org/ggml.
"""

from __future__ import annotations

import itertools
import math
import mmap
import pathlib
from typing import Any, NamedTuple

import gguf
import jax.numpy as jnp
import numpy as np

from lorax import untrusted
from lorax.interop import files

LIMIT = 200 * 2**20
"""Most bytes of a header. 256,000 tokens and their merges take about 12 MB."""

ALIGNMENT = "general.alignment"
_Value = gguf.GGUFValueType
NUMBERS = {
    _Value.UINT8: "<u1",
    _Value.INT8: "<i1",
    _Value.UINT16: "<u2",
    _Value.INT16: "<i2",
    _Value.UINT32: "<u4",
    _Value.INT32: "<i4",
    _Value.FLOAT32: "<f4",
    _Value.BOOL: "<u1",
    _Value.UINT64: "<u8",
    _Value.INT64: "<i8",
    _Value.FLOAT64: "<f8",
}
FLOATS = {
    gguf.GGMLQuantizationType.F64: np.dtype(np.float64),
    gguf.GGMLQuantizationType.F32: np.dtype(np.float32),
    gguf.GGMLQuantizationType.F16: np.dtype(np.float16),
    gguf.GGMLQuantizationType.BF16: np.dtype(jnp.bfloat16),
}
"""NumPy dtypes for the types that are stored as they are."""

_SMALLEST_ENTRY = 8 + 4 + 1  # bytes of a key and its value
_SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8


class Stored(NamedTuple):
    """A tensor on disk.

    Attributes:
      kind: its ggml type.
      shape: the slowest axis first, the reverse of the order in the file.
      raw: its bytes: floats in that shape, or blocks, `[..., bytes per row]` uint8.
    """

    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    raw: files.Tensor


class Header(NamedTuple):
    """The header of a file.

    Attributes:
      path: the file.
      metadata: `{key: value}`; arrays are lists.
      tensors: by name.
    """

    path: pathlib.Path
    metadata: dict[str, Any]
    tensors: dict[str, Stored]

    def field(self, key: str, rule: untrusted.Rule, default: Any = None) -> Any:
        """Returns a value after checking it by a rule; the default if it is absent.

        Raises:
          ValueError: it does not fit the rule, or is absent without a default.
        """
        if key not in self.metadata:
            if default is None:
                raise ValueError(f"{self.path}: there is no {key!r} in the metadata")
            return default
        return untrusted.check(f"{self.path}: {key}", self.metadata[key], rule)


def read(path: pathlib.Path) -> Header:
    """Returns the header of a file.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: it is not a GGUF file of version 2 or 3, ends early, has a key or a
        tensor twice, or an impossible value; the message names the key or tensor.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    size = path.stat().st_size
    if size < 24:
        raise ValueError(f"{path} has {size} bytes, so it is not a GGUF file")
    with open(path, "rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            try:
                return _Parser(path, view).header()
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error


class _Parser:
    """A position in the bytes of a header, and the readers that advance it."""

    def __init__(self, path: pathlib.Path, view: mmap.mmap) -> None:
        self.path, self.view, self.at = path, view, 0
        self.size = len(view)
        self.end = min(self.size, LIMIT)

    def header(self) -> Header:
        """Returns the whole header."""
        self._opened()
        tensors, entries = self._whole(8, "counts"), self._whole(8, "counts")
        self._room(tensors * _SMALLEST_TENSOR, f"{tensors} tensors")
        self._room(entries * _SMALLEST_ENTRY, f"{entries} keys")
        metadata: dict[str, Any] = {}
        for i in range(entries):
            key = self._text(f"key {i}")
            if key in metadata:
                raise ValueError(f"the key {key!r} appears twice")
            metadata[key] = self._value(self._kind(key), key)
        infos: dict[str, tuple[Any, tuple[int, ...], int]] = {}
        for i in range(tensors):
            name = self._text(f"the name of tensor {i}")
            if name in infos:
                raise ValueError(f"the tensor {name!r} appears twice")
            infos[name] = self._tensor(name)
        return Header(self.path, metadata, self._placed(infos, metadata))

    def _opened(self) -> None:
        """Reads the magic and the version."""
        magic = self._bytes(4, "the magic")
        if magic != b"GGUF":
            raise ValueError(f"starts with {magic!r}, so it is not a GGUF file")
        version = self._whole(4, "the version")
        if version & 0xFFFF == 0:
            raise ValueError(
                "is a big-endian GGUF file; convert it with gguf-convert-endian from "
                "the gguf package"
            )
        if version not in (2, 3):
            raise ValueError(
                f"is GGUF version {version}; only 2 and 3 are supported: convert the "
                "model again"
            )

    def _room(self, count: int, what: str) -> None:
        """Raises ValueError unless so many bytes are left."""
        if count > self.end - self.at:
            beyond = (
                f"the {LIMIT} bytes that a header may have"
                if self.end < self.size
                else f"the end of the file, which has {self.size} bytes"
            )
            raise ValueError(
                f"{what}: {count} bytes from {self.at} are beyond {beyond}"
            )

    def _bytes(self, count: int, what: str) -> bytes:
        self._room(count, what)
        found = self.view[self.at : self.at + count]
        self.at += count
        return found

    def _whole(self, size: int, what: str) -> int:
        """Reads an unsigned integer."""
        return int.from_bytes(self._bytes(size, what), "little")

    def _text(self, what: str) -> str:
        raw = self._bytes(self._whole(8, what), what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{what}: {untrusted.shown(raw)} is not UTF-8 ({error.reason})"
            ) from None

    def _kind(self, key: str) -> gguf.GGUFValueType:
        number = self._whole(4, key)
        try:
            return _Value(number)
        except ValueError:
            raise ValueError(f"{key}: {number} is not a value type") from None

    def _value(self, kind: gguf.GGUFValueType, key: str) -> Any:
        if kind == _Value.STRING:
            return self._text(key)
        if kind != _Value.ARRAY:
            return self._numbers(kind, 1, key)[0]
        inner, count = self._kind(key), self._whole(8, key)
        if inner == _Value.ARRAY:
            raise ValueError(f"{key}: arrays of arrays are not supported")
        if inner != _Value.STRING:
            return self._numbers(inner, count, key)
        self._room(8 * count, f"{key}, an array of {count} texts")
        return [self._text(f"{key}[{i}]") for i in range(count)]

    def _numbers(self, kind: gguf.GGUFValueType, count: int, key: str) -> list[Any]:
        dtype = np.dtype(NUMBERS[kind])
        found = np.frombuffer(self._bytes(count * dtype.itemsize, key), dtype)
        if kind != _Value.BOOL:
            return found.tolist()
        if (found > 1).any():
            raise ValueError(f"{key}: a boolean is {found.max()}, not 0 or 1")
        return found.astype(bool).tolist()

    def _tensor(self, name: str) -> tuple[Any, tuple[int, ...], int]:
        """The ggml type, the shape, and the offset from the start of the data."""
        count = self._whole(4, name)
        if not 1 <= count <= 4:
            raise ValueError(f"{name!r} has {count} dimensions; it must be 1 to 4")
        dims = [self._whole(8, name) for _ in range(count)]
        if min(dims) < 1 or math.prod(dims) > 2**62:
            raise ValueError(f"{name!r} has the impossible shape {dims}")
        number, offset = self._whole(4, name), self._whole(8, name)
        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError:
            raise ValueError(
                f"{name!r} has the unknown ggml type {number}; convert it to a known "
                "type, such as Q8_0, with llama-quantize"
            ) from None
        return kind, tuple(reversed(dims)), offset

    def _placed(
        self,
        infos: dict[str, tuple[Any, tuple[int, ...], int]],
        metadata: dict[str, Any],
    ) -> dict[str, Stored]:
        """The tensors, checked to be inside the file and not to overlap."""
        align = metadata.get(ALIGNMENT, gguf.GGUF_DEFAULT_ALIGNMENT)
        untrusted.check(ALIGNMENT, align, untrusted.whole(1, 2**20))
        if align & (align - 1):
            raise ValueError(f"{ALIGNMENT}={align} is not a power of two")
        begin = -(-self.at // align) * align
        found = {}
        for name, (kind, shape, offset) in infos.items():
            if offset % align:
                raise ValueError(f"{name!r} begins at {offset}, not aligned to {align}")
            dtype, stored = _layout(name, kind, shape)
            raw = files.Tensor(self.path, name, dtype, stored, begin + offset)
            if raw.offset + raw.nbytes > self.size:
                raise ValueError(
                    f"{name!r}: {raw.nbytes} bytes from {raw.offset} are beyond the "
                    f"end of the file, at {self.size}; the file is truncated"
                )
            found[name] = Stored(kind, shape, raw)
        order = sorted(
            (tensor.raw for tensor in found.values()), key=lambda r: r.offset
        )
        for one, other in itertools.pairwise(order):
            if one.offset + one.nbytes > other.offset:
                raise ValueError(f"{one.key!r} and {other.key!r} overlap")
        return found


def _layout(
    name: str, kind: gguf.GGMLQuantizationType, shape: tuple[int, ...]
) -> tuple[np.dtype, tuple[int, ...]]:
    """The dtype and shape of a tensor's bytes."""
    if kind in FLOATS:
        return FLOATS[kind], shape
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise ValueError(
            f"{name!r} has rows of {shape[-1]}, which {kind.name} blocks of {block} do "
            "not divide"
        )
    return np.dtype(np.uint8), (*shape[:-1], shape[-1] // block * size)
