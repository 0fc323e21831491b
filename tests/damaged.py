"""Files with one field changed, for every format that lorax reads: cases of a fuzz.

A `Source` writes a sound directory and loads it. A `Case` is one change to it. What
loads afterwards must equal what the sound files give, except where `legal` says what
the change means; an error must name the file and the key that are wrong.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy

KINDS = {
    "null": [None],
    "bool": [True, False],
    "text": ["x", "", "1"],
    "nested": [{"x": [{"y": 1}]}, [[1]], {}],
    "huge": [2**70, 2**31 - 1, 1e300],
    "NaN": [float("nan"), float("inf")],
    "negative": [-1, -0.5],
    "missing": [None],
    "empty list": [[]],
}
"""What a field becomes; if there are several values, one is drawn."""


class Case(NamedTuple):
    """One change.

    Attributes:
      source: name of the source.
      key: path of the field in the JSON, or name of a tensor.
      kind: the kind of change.
      value: what the field becomes; unused for "missing".
    """

    source: str
    key: tuple[str, ...]
    kind: str
    value: Any


@dataclasses.dataclass(frozen=True)
class Source:
    """A sound directory.

    Attributes:
      folder: the folder with the files.
      file: name of the changed JSON or safetensors file.
      load: maps a folder to a tree of arrays and plain values.
      legal: `(case) -> result`, for cases that may load and mean something else.
      keys: of the fields; None for all.
      resealed: makes a changed JSON file sound again except for the change.
    """

    folder: Any
    file: str
    load: Callable[[Any], Any]
    legal: Callable[[Case], Any] = lambda case: None
    keys: list[tuple[str, ...]] | None = None
    resealed: Callable[[Any], None] = lambda told: None


def keys_of(told: Any, front: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all fields, nested ones included."""
    if isinstance(told, dict):
        for key, value in told.items():
            yield (*front, key)
            yield from keys_of(value, (*front, key))


def json_cases(name: str, source: Source, seed: int) -> list[Case]:
    """Each field with each kind of change."""
    draw = np.random.default_rng(seed)
    told = json.loads((source.folder / source.file).read_text())
    keys = list(keys_of(told)) if source.keys is None else source.keys
    return [
        Case(name, key, kind, values[draw.integers(len(values))])
        for key in keys
        for kind, values in KINDS.items()
    ]


TENSORS = {
    "missing": lambda x: None,
    "renamed": lambda x: x,
    "transposed": lambda x: x.T if x.ndim > 1 else x[:-1],
    "empty": lambda x: x[:0],
    "scalar": lambda x: x.reshape(-1)[0].reshape(()),
    "one axis more": lambda x: x[None],
    "one row more": lambda x: np.concatenate([x, x[:1]]),
    "NaN": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 0, np.nan, x),
    "whole numbers": lambda x: x,
}
"""What a tensor becomes."""


def tensor_cases(name: str, source: Source) -> list[Case]:
    """Each tensor with each kind of change."""
    tensors = safetensors.numpy.load_file(source.folder / source.file)
    return [Case(name, (key,), kind, None) for key in tensors for kind in TENSORS]


def write(source: Source, case: Case, folder: Any) -> None:
    """Copies the sound directory and makes the change."""
    shutil.copytree(source.folder, folder, symlinks=True)
    file = folder / source.file
    if source.file.endswith(".safetensors"):
        tensors = safetensors.numpy.load_file(file)
        changed = TENSORS[case.kind](tensors.pop(case.key[0]))
        if changed is not None:
            name = case.key[0] + ("_of" if case.kind == "renamed" else "")
            dtype = np.int32 if case.kind == "whole numbers" else np.float32
            tensors[name] = np.array(changed, dtype, order="C")
        safetensors.numpy.save_file(tensors, file)
        return
    told = json.loads(file.read_text())
    place = told
    for key in case.key[:-1]:
        place = place[key]
    if case.kind == "missing":
        del place[case.key[-1]]
    else:
        place[case.key[-1]] = copy.deepcopy(case.value)
    source.resealed(told)
    file.write_text(json.dumps(told))


def same(left: Any, right: Any) -> bool:
    """Whether structure, plain values, dtypes and bits are the same."""
    leaves, structure = jax.tree.flatten(left)
    others, other = jax.tree.flatten(right)
    if structure != other:
        return False
    for one, two in zip(leaves, others, strict=True):
        if isinstance(one, jax.Array | np.ndarray):
            if jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
                one, two = jax.random.key_data(one), jax.random.key_data(two)
            one, two = np.asarray(one), np.asarray(two)
            if one.dtype != two.dtype or one.tobytes() != two.tobytes():
                return False
        elif one != two and not (one != one and two != two):
            return False
    return True


def outcome(source: Source, case: Case, sound: Any, folder: Any) -> str:
    """Returns "loaded" or "refused", or else what is wrong."""
    write(source, case, folder)
    try:
        found = source.load(folder)
    except (ValueError, FileNotFoundError) as error:
        told = str(error)
        inner = [key for key in case.key if key not in ("payload", "adapters")]
        inner = inner or case.key
        if not any(part in told for part in inner) and "digest" not in told:
            return f"the key is not named: {type(error).__name__}: {told}"
        files = {path.name for path in folder.rglob("*") if path.is_file()}
        if not any(name in told for name in files):
            return f"the file is not named: {type(error).__name__}: {told}"
        return "refused"
    except Exception as error:
        return f"raw: {type(error).__name__}: {error}"
    finally:
        shutil.rmtree(folder)
    if same(found, sound):
        return "loaded"
    meant = source.legal(case)
    if meant is not None and same(found, meant):
        return "loaded"
    return "loaded, and is another: silent"
