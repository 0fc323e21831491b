"""Reads JSON and safetensors files from untrusted sources.

The safetensors library checks the header (sizes, offsets, gaps, overlaps); the bytes
are then read by position rather than through its memory map, whose touched pages would
count towards the process's memory in addition to the arrays.
"""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

from lorax import untrusted

JSON_LIMIT = 100 * 2**20  # bytes; the limit of safetensors for a header

DTYPES = {
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "BOOL": np.bool_,
    **{f"F{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    **{f"I{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
}
"""NumPy dtypes by safetensors' names."""


def read_json(path: pathlib.Path, kind: type = dict) -> Any:
    """Returns the object in a JSON file, or the array if `kind=list`.

    Raises:
      ValueError: it is too long, malformed, of another kind, or has a key twice.
    """
    if path.stat().st_size > JSON_LIMIT:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, too many for JSON")
    try:
        return untrusted.parsed(path.read_text(encoding="utf-8"), kind)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def inside(directory: pathlib.Path, name: str) -> pathlib.Path:
    """Returns the path of a file in `directory`, which it must not lead out of.

    Links into the blob store next to the snapshots of a hub cache are followed.

    Raises:
      ValueError: it leads out of the directory.
      FileNotFoundError: there is no such file.
    """
    path = directory / name
    roots = [directory.resolve()]
    if directory.resolve().parent.name == "snapshots":
        roots.append(directory.resolve().parent.parent / "blobs")
    real = path.resolve()
    if not any(real.is_relative_to(root) for root in roots):
        raise ValueError(f"{path} leads out of its directory, to {real}; refused")
    if not real.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return path


class Tensor(NamedTuple):
    """One tensor on disk, not yet read.

    Attributes:
      path: its file.
      key: its name.
      dtype: its NumPy dtype.
      shape: on disk.
      offset: of its first byte in the file.
    """

    path: pathlib.Path
    key: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def require_floating(self) -> None:
        """Raises ValueError unless its values are floats, as trained values are."""
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(f"{self.key!r} has dtype {self.dtype}, not a float")

    def read(self, rows: slice = slice(None)) -> np.ndarray:
        """Returns the tensor, or some of its rows, reading only their bytes.

        Raises:
          ValueError: the file ends early, or a value is NaN or infinite.
        """
        if not self.shape:
            return self._read(self.offset, ())
        start, stop, _ = rows.indices(self.shape[0])
        row = self.nbytes // max(self.shape[0], 1)
        return self._read(self.offset + start * row, (stop - start, *self.shape[1:]))

    def read_block(self, rows: slice, columns: slice) -> np.ndarray:
        """Returns a block of a matrix, reading only its bytes."""
        first, last, _ = columns.indices(self.shape[1])
        if (first, last) == (0, self.shape[1]):
            return self.read(rows)
        start, stop, _ = rows.indices(self.shape[0])
        block = np.empty((stop - start, last - first), self.dtype)
        width, size = self.shape[1], self.dtype.itemsize
        with open(self.path, "rb", buffering=0) as file:
            for i, row in enumerate(range(start, stop)):
                file.seek(self.offset + (row * width + first) * size)
                self._fill(file, block[i])
        return self._checked(block)

    def _read(self, offset: int, shape: tuple[int, ...]) -> np.ndarray:
        whole = np.empty(shape, self.dtype)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(offset)
            self._fill(file, whole)
        return self._checked(whole)

    def _fill(self, file: Any, array: np.ndarray) -> None:
        left = memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        while left:
            count = file.readinto(left[: 2**30])
            if not count:
                raise ValueError(f"{self.path}: the file ends inside {self.key!r}")
            left = left[count:]

    def _checked(self, array: np.ndarray) -> np.ndarray:
        if not is_finite(array):
            raise ValueError(f"{self.path}: {self.key!r} holds NaN or infinity")
        return array


def is_finite(array: np.ndarray) -> bool:
    """True if no value is NaN or infinite; works in pieces to save memory."""
    if array.dtype == jnp.bfloat16:
        bits, mask = array.reshape(-1).view(np.uint16), np.uint16(0x7F80)
        step = 2**22
        return not any(
            ((bits[i : i + step] & mask) == mask).any()
            for i in range(0, bits.size, step)
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return True
    flat, step = array.reshape(-1), 2**22
    return all(np.isfinite(flat[i : i + step]).all() for i in range(0, flat.size, step))


def open_tensors(path: pathlib.Path) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file, after checking its header.

    Raises:
      ValueError: the file is truncated, its header is wrong or has a key twice, or a
        dtype is unknown.
    """
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a valid safetensors file: {error}") from error
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = untrusted.parsed(file.read(length).decode())
        except ValueError as error:
            raise ValueError(f"{path}: in the header: {error}") from error
    header.pop("__metadata__", None)
    found = {}
    for key, told in header.items():
        if told["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {key!r} has the unknown dtype {told['dtype']!r}")
        begin = 8 + length + told["data_offsets"][0]
        dtype = np.dtype(DTYPES[told["dtype"]])
        found[key] = Tensor(path, key, dtype, tuple(told["shape"]), begin)
    return found


def open_checkpoint(directory: pathlib.Path, stem: str = "model") -> dict[str, Tensor]:
    """Returns the tensors of `stem.safetensors`, or of the files that its index names.

    Raises:
      FileNotFoundError: neither exists.
      ValueError: as for `open_tensors`; or the index disagrees with its files.
    """
    single = f"{stem}.safetensors"
    index = f"{single}.index.json"
    if (directory / single).exists():
        return open_tensors(inside(directory, single))
    if not (directory / index).exists():
        raise FileNotFoundError(_nothing(directory, single))
    where = read_json(inside(directory, index)).get("weight_map")
    if not isinstance(where, dict) or not all(
        isinstance(name, str) for name in where.values()
    ):
        raise ValueError(f"{directory / index} lacks a weight_map of file names")
    found: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        own = open_tensors(inside(directory, name))
        named = {key for key, file in where.items() if file == name}
        if named != set(own):
            odd = ", ".join(sorted(named ^ set(own))[:5])
            raise ValueError(f"{directory / index} and {name} disagree on {odd}")
        found |= own
    return found


def _nothing(directory: pathlib.Path, name: str) -> str:
    """The message for a directory without safetensors."""
    told = f"{directory} has neither {name} nor {name}.index.json"
    pickles = [p.name for p in directory.glob("*") if p.suffix in (".bin", ".pt")]
    if pickles:
        told += (
            f"; {pickles[0]} is a pickle, which can run code and is never read: "
            "save it as safetensors (model.save_pretrained in transformers)"
        )
    return told


def matches(patterns: Iterable[str], name: str) -> bool:
    """True if one of the regular expressions matches the whole name."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)
