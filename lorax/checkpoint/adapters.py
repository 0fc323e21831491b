"""Adapters on disk: arrays in orbax, everything else in `adapters.json`.

    path/adapters.json   {"format": 1, "library": ..., "generation": n, "adapters":
                          {path: {class, static fields, shapes and dtypes}}, "base":
                          {path: {shape, dtype, sha256}} or null}
    path/arrays-n/       orbax: {path: {field: array}}

`adapters.json` is written last and replaced in one move, so a directory without it is
no checkpoint, and overwriting one keeps the old arrays until the new ones are complete.
It is data: reading it runs no code and imports nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from lorax import adapters as adapter_classes
from lorax import tree
from lorax.types import Adapters, Axes, PyTree

FORMAT = 1
INDEX = "adapters.json"
RECORDS = {cls.__name__: cls for cls in (Axes,)}
"""Named tuples that static fields may hold, by name."""


def save_adapters(
    path: str | os.PathLike[str],
    adapters: Adapters,
    params: PyTree = None,
    *,
    overwrite: bool = False,
) -> None:
    """Writes adapters to a directory, from which they load without a template.

    Args:
      path: the directory, local or anything orbax writes to (`gs://...`).
      adapters: `{path: Adapter}`.
      params: the base they belong to, after `lorax.init` (an init may move part of a
        kernel). Only a fingerprint is stored: shape, dtype and content digest of each
        adapted leaf, by which loading tells another base. None stores none.
      overwrite: replace the checkpoint that is there.

    Raises:
      FileExistsError: there is one, and `overwrite` is False.
      ValueError: no adapters, or ones that do not fit `params`.
      KeyError: `params` lacks an adapted path.
      TypeError: an adapter of no class in `lorax.adapters.CLASSES`, or a static field
        that JSON cannot hold.

    Example:
      >>> import tempfile
      >>> from lorax.adapters import Full
      >>> adapters = {"head/bias": Full(jnp.array([1.0, 2.0]))}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_adapters(folder + "/adapter", adapters)
      ...     load_adapters(folder + "/adapter")
      {'head/bias': Full(value=Array([1., 2.], dtype=float32))}
    """
    folder = folder_of(path)
    if (folder / INDEX).exists() and not overwrite:
        raise FileExistsError(
            f"{folder} holds adapters already; pass overwrite=True to replace them"
        )
    if not adapters:
        raise ValueError("adapters is empty: there is nothing to save")
    index = {
        "format": FORMAT,
        "library": f"lorax {_version()}",
        "generation": max(_generations(folder), default=-1) + 1,
        "adapters": {name: describe(name, a) for name, a in adapters.items()},
        "base": None if params is None else _fingerprint(adapters, params),
    }
    text = json.dumps(index, indent=1, allow_nan=False)
    arrays = {item_name(name): _arrays(adapter) for name, adapter in adapters.items()}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        target = folder / f"arrays-{index['generation']}"
        checkpointer.save(target, args=ocp.args.PyTreeSave(arrays))
    if jax.process_index() == 0:
        part = folder / f"{INDEX}.part"
        part.write_text(text)
        part.replace(folder / INDEX)
        for stale in set(_generations(folder)) - {index["generation"]}:
            (folder / f"arrays-{stale}").rmtree(missing_ok=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("lorax.checkpoint.save_adapters")


def load_adapters(
    path: str | os.PathLike[str],
    template: Adapters | None = None,
    params: PyTree = None,
) -> Adapters:
    """Reads what `save_adapters` wrote: the same bits, the same static fields.

    Args:
      path: the directory.
      template: adapters of the expected paths, classes, static fields, shapes and
        dtypes (arrays or `jax.ShapeDtypeStruct`); arrays are put on its shardings.
        None takes what is there, on the default device.
      params: the base the adapters will be applied to, held against the fingerprint.
        None leaves the base unchecked.

    Returns:
      `{path: Adapter}`.

    Raises:
      FileNotFoundError: no such directory.
      ValueError: no adapter checkpoint, a damaged one or one of a newer format; a
        template or a base that differs, naming the path and the difference.
      KeyError: `params` lacks an adapted path.

    Example:
      >>> import tempfile
      >>> from lorax.adapters import Lora
      >>> lora = Lora(jnp.ones((3, 1)), jnp.zeros((1, 2)), 2.0, Axes((0,), (1,)))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_adapters(folder, {"dense/kernel": lora})
      ...     loaded = load_adapters(folder)
      >>> loaded["dense/kernel"].scale, loaded["dense/kernel"].axes
      (2.0, Axes(in_=(0,), out=(1,), batch=()))
    """
    folder = folder_of(path)
    index = _read_index(folder)
    skeleton = {name: skeleton_of(name, e) for name, e in index["adapters"].items()}
    if template is not None:
        check_template(skeleton, template)
    if params is not None:
        _check_base(skeleton, index["base"] or {}, params)
    arrays = _read_arrays(folder / f"arrays-{index['generation']:d}", skeleton)
    loaded = {}
    for name, adapter in skeleton.items():
        places = {}
        for field, leaf in _arrays(template[name] if template else adapter).items():
            places[field] = getattr(leaf, "sharding", None)
        loaded[name] = adapter.replace(
            **jax.device_put(arrays[item_name(name)], places)
        )
    return loaded


def folder_of(path: str | os.PathLike[str]) -> epath.Path:
    """Returns the path as orbax wants it."""
    # Orbax wants absolute paths; a bucket's address already is one.
    folder = epath.Path(path)
    return folder if "://" in os.fspath(path) else folder.expanduser().absolute()


def _version() -> str:
    try:
        return metadata.version("lorax-flax")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def item_name(path: str) -> str:
    """The path as a key in orbax, which joins nested keys by dots."""
    return path.replace("%", "%25").replace(".", "%2E")


# Writing


def _fields(adapter: Any, static: bool) -> list[str]:
    is_static = lambda field: not field.metadata.get("pytree_node", True)
    return [f.name for f in dataclasses.fields(adapter) if is_static(f) == static]


def _arrays(adapter: Any) -> dict[str, Any]:
    """The array fields that are not None."""
    values = {name: getattr(adapter, name) for name in _fields(adapter, static=False)}
    return {name: value for name, value in values.items() if value is not None}


def _generations(folder: epath.Path) -> list[int]:
    """The generations of arrays in the folder, finished or not."""
    names = [p.name.removeprefix("arrays-") for p in folder.glob("arrays-*")]
    return [int(name) for name in names if name.isdecimal()]


def describe(path: str, adapter: Any) -> dict[str, Any]:
    """Everything about an adapter but its numbers, as JSON data."""
    name = type(adapter).__name__
    if adapter_classes.CLASSES.get(name) is not type(adapter):
        raise TypeError(
            f"{path}: {name} is not in lorax.adapters.CLASSES, so it could not be "
            "loaded again; register it there"
        )
    static = {
        field: _encode(f"{path}: {field}", getattr(adapter, field))
        for field in _fields(adapter, static=True)
    }
    arrays = {field: _kind(value) for field, value in _arrays(adapter).items()}
    return {"class": name, "static": static, "arrays": arrays}


def _kind(array: Any) -> dict[str, Any]:
    return {"shape": list(array.shape), "dtype": jnp.dtype(array.dtype).name}


def _encode(where: str, value: Any) -> Any:
    """A static field as JSON data: tuples are lists, named tuples {name: fields}."""
    if isinstance(value, np.generic | np.ndarray | jax.Array) and value.ndim == 0:
        value = value.item()
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, tuple):
        if RECORDS.get(type(value).__name__) is type(value):
            fields = value._asdict().items()
            return {type(value).__name__: {k: _encode(where, v) for k, v in fields}}
        if type(value) is tuple:
            return [_encode(where, item) for item in value]
    raise TypeError(
        f"{where} is {value!r}; adapters.json holds None, bool, int, finite float, str "
        f"and tuples of these ({', '.join(RECORDS)} among them)"
    )


def _fingerprint(adapters: Adapters, params: PyTree) -> dict[str, Any]:
    leaves = tree.flatten(params)
    tree.require(adapters, leaves, "parameter tree")
    for name, adapter in adapters.items():
        adapter.check(name, leaves[name])
    return {name: _seal(leaves[name]) for name in adapters}


def _seal(leaf: Any) -> dict[str, Any]:
    if not tree.is_concrete(leaf):
        return _kind(leaf) | {"sha256": None}
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    data = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
    return _kind(leaf) | {"sha256": hashlib.sha256(data.data).hexdigest()}


# Reading


def _read_index(folder: epath.Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no directory {folder}")
    if not (folder / INDEX).exists():
        raise ValueError(
            f"{folder} has no {INDEX}: another kind of checkpoint, or one whose saving "
            "was cut short"
        )
    try:
        index = json.loads((folder / INDEX).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / INDEX} is damaged: {error}") from error
    form = {"format": int, "generation": int, "adapters": dict, "base": dict | None}
    for field, kind in form.items():
        if not isinstance(index, dict) or not isinstance(index.get(field), kind):
            raise ValueError(f"{folder / INDEX} is damaged: no {field} in it")
        if field == "format" and index[field] > FORMAT:  # the rest may look otherwise
            raise ValueError(
                f"{folder / INDEX} has format {index[field]} of {index.get('library')}"
                f"; this lorax reads up to {FORMAT}: upgrade lorax"
            )
    return index


def skeleton_of(path: str, entry: Any) -> Any:
    """The adapter with abstract arrays."""
    try:
        name, static, kinds = entry["class"], entry["static"], entry["arrays"]
        if name not in adapter_classes.CLASSES:
            raise LookupError(f"class {name!r} is none of {[*adapter_classes.CLASSES]}")
        cls = adapter_classes.CLASSES[name]
        arrays: dict[str, Any] = dict.fromkeys(_fields(cls, static=False))
        for field, kind in kinds.items():
            shape, dtype = tuple(kind["shape"]), jnp.dtype(kind["dtype"])
            arrays[field] = jax.ShapeDtypeStruct(shape, dtype)
        return cls(**arrays, **{k: _decode(v) for k, v in static.items()})
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: its entry in {INDEX} does not fit this lorax ({error}); upgrade "
            "lorax if a newer one wrote it, else the file is damaged"
        ) from error


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_decode, value))
    if isinstance(value, dict):
        ((name, fields),) = value.items()
        return RECORDS[name](**{k: _decode(v) for k, v in fields.items()})
    return value


def check_template(skeleton: Adapters, template: Adapters) -> None:
    """Raises ValueError naming the first path and field in which the two differ."""
    if differing := sorted(skeleton.keys() ^ template.keys()):
        where = "checkpoint" if differing[0] in skeleton else "template"
        raise ValueError(
            f"{differing[0]}: only the {where} has an adapter there ({len(differing)} "
            "paths differ)"
        )
    for path, adapter in skeleton.items():
        ours, theirs = describe(path, adapter), describe(path, template[path])
        if ours["class"] != theirs["class"]:
            raise ValueError(
                f"{path}: the checkpoint has class {ours['class']} and the template "
                f"{theirs['class']}"
            )
        for part in ("static", "arrays"):
            for field in ours[part] | theirs[part]:
                pair = ours[part].get(field), theirs[part].get(field)
                if pair[0] != pair[1]:
                    raise ValueError(
                        f"{path}: the checkpoint has {field}={pair[0]} and the "
                        f"template {field}={pair[1]}"
                    )


def _check_base(skeleton: Adapters, base: dict[str, Any], params: PyTree) -> None:
    for path, now in _fingerprint(skeleton, params).items():
        then = base.get(path, {})
        for field, value in now.items():
            if None not in (value, then.get(field)) and value != then[field]:
                raise ValueError(
                    f"{path}: the adapters were made for another base: {field} "
                    f"{then[field]} in the checkpoint, {value} in params. Pass the "
                    "params that lorax.init returned (an init may change them), or "
                    "none to leave the base unchecked"
                )


def _read_arrays(folder: epath.Path, skeleton: Adapters) -> dict[str, Any]:
    """The arrays as numpy, so that they load whatever devices they were saved from."""
    want = {item_name(name): _arrays(adapter) for name, adapter in skeleton.items()}
    restore = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), want)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            args = ocp.args.PyTreeRestore(restore_args=restore)
            arrays = checkpointer.restore(folder, args=args)
        same = jax.tree.map(lambda x, w: _kind(x) == _kind(w), arrays, want)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"the arrays in {folder} are damaged: {error}") from error
    if not all(jax.tree.leaves(same)):
        raise ValueError(f"the arrays in {folder} do not fit {INDEX}: both are damaged")
    for leaf in jax.tree.leaves(arrays):
        if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
            raise ValueError(
                f"the arrays in {folder} are {leaf.dtype}, which JAX would round: set "
                "jax.config.update('jax_enable_x64', True) before loading"
            )
    return arrays
