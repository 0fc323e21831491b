"""Adapters on disk: arrays in orbax, everything else in `adapters.json`.

    path/adapters.json   {"format": 1, "library": ..., "generation": n,
                          "adapters": {path: {class, static fields; of every array
                          shape, dtype and digest}},
                          "base": {path: {shape, dtype, sha256}} or null,
                          "digests": of every field above; of adapters and base by path}
    path/arrays-n/       orbax: {path: {field: array}}

`adapters.json` is written last and replaced in one move, so a directory without it is
no checkpoint, and overwriting one keeps the old arrays until the new ones are complete.
It is data: reading it runs no code and imports nothing. Every field is held to its type
and range, and to its digest, before an array is read; every array is then held to its
own. (Older files have no digests, and load as well.)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from lorax import tree, untrusted
from lorax.checkpoint import digests, entries, folders, record
from lorax.checkpoint.entries import item_name
from lorax.types import Adapters, PyTree

FORMAT = 1
INDEX = "adapters.json"
FIELDS = {
    "format": untrusted.whole(1),
    "library": untrusted.TEXT,
    "generation": untrusted.whole(),
    "adapters": untrusted.mapping(untrusted.ANY, 1),
    "base": untrusted.TABLE | None,
}
"""What the fields of the index must be; it may have others, which are sealed too."""
BASE = {
    "shape": untrusted.SHAPE,
    "dtype": untrusted.TEXT,
    "sha256": untrusted.digits(64) | None,
}


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
      overwrite: replace the checkpoint that is there; not by NaN or an infinity.

    Raises:
      FileExistsError: there is one, and `overwrite` is False.
      ValueError: no adapters, ones that do not fit `params`, a static field out of its
        range, or adapters that are not finite and would replace a checkpoint.
      KeyError: `params` lacks an adapted path.
      TypeError: an adapter whose class is not registered, or a static field
        that JSON cannot hold.
      OSError: the directory cannot be written (no space left, no permission); what it
        held is as it was.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> from lorax.adapters import Full
      >>> adapters = {"head/bias": Full(jnp.array([1.0, 2.0]))}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_adapters(folder + "/adapter", adapters)
      ...     load_adapters(folder + "/adapter")
      {'head/bias': Full(value=Array([1., 2.], dtype=float32))}
    """
    folder = folder_of(path)
    folders.require_directory(folder)
    if not adapters:
        raise ValueError("adapters is empty: there is nothing to save")
    if (folder / INDEX).exists():
        if not overwrite:
            raise FileExistsError(
                f"{folder} holds adapters already; pass overwrite=True to replace them"
            )
        _require_finite(folder, adapters)
    index = {
        "format": FORMAT,
        "library": f"lorax {_version()}",
        "generation": max(_generations(folder), default=-1) + 1,
        "adapters": {name: _entry(name, a) for name, a in adapters.items()},
        "base": None if params is None else _fingerprint(adapters, params),
    }
    index["digests"] = seals(index)
    text = json.dumps(index, indent=1, allow_nan=False)
    arrays = {item_name(name): entries.arrays(a) for name, a in adapters.items()}
    with _writing(folder):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            target = folder / f"arrays-{index['generation']}"
            checkpointer.save(target, args=ocp.args.PyTreeSave(arrays))
        if jax.process_index() == 0:
            part = folder / f"{INDEX}.part"
            part.write_text(text)
            part.replace(folder / INDEX)
    if jax.process_index() == 0:
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
      >>> import jax.numpy as jnp
      >>> from lorax.adapters import Lora
      >>> from lorax.types import Axes
      >>> lora = Lora(jnp.ones((3, 1)), jnp.zeros((1, 2)), 2.0, Axes((0,), (1,)))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_adapters(folder, {"dense/kernel": lora})
      ...     loaded = load_adapters(folder)
      >>> loaded["dense/kernel"].scale, loaded["dense/kernel"].axes
      (2.0, Axes(in_=(0,), out=(1,), batch=()))
    """
    folder = folder_of(path)
    index, skeleton = _read_index(folder)
    try:
        if template is not None:
            skeleton = entries.filled(skeleton, index["adapters"], template)
            entries.check_template(skeleton, template)
        if params is not None:
            _check_base(skeleton, index["base"] or {}, params)
    except ValueError as error:
        raise ValueError(f"{folder / INDEX}: {error}") from error
    place = folder / f"arrays-{index['generation']}"
    arrays = _read_arrays(place, skeleton)
    for name, entry in index["adapters"].items():
        _verify(f"{place}: {name}", entry["arrays"], arrays[item_name(name)])
    loaded = {}
    for name, adapter in skeleton.items():
        places = {}
        like = template[name] if template else adapter
        for field, leaf in entries.arrays(like).items():
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


# Writing


@contextlib.contextmanager
def _writing(folder: epath.Path) -> Iterator[None]:
    """Names the directory in whatever orbax and tensorstore raise."""
    try:
        yield
    except Exception as error:
        reason = str(error).split(" [tensorstore_spec")[0]
        raise OSError(
            f"{folder} could not be written: {reason}. Adapters that were there are as "
            "they were; make room there, or permissions, and save once more"
        ) from error


def _require_finite(folder: epath.Path, adapters: Adapters) -> None:
    """ValueError naming a leaf that would replace a good one by NaN or an infinity."""
    for name, adapter in adapters.items():
        for field, value in entries.arrays(adapter).items():
            if not jax.numpy.isfinite(value).all():
                raise ValueError(
                    f"{name}: {field} is not finite, and {folder} holds adapters that "
                    "may be good: save these to another directory, or delete that one"
                )


def _generations(folder: epath.Path) -> list[int]:
    """The generations of arrays in the folder, finished or not."""
    names = [p.name.removeprefix("arrays-") for p in folder.glob("arrays-*")]
    return [int(name) for name in names if name.isdecimal()]


def _entry(path: str, adapter: Any) -> dict[str, Any]:
    """An adapter's description, which is sure to load, with its arrays' digests."""
    entry = entries.describe(path, adapter)
    try:
        entries.skeleton(entry)
    except ValueError as error:
        raise ValueError(f"{path} could not be loaded again: {error}") from error
    for field, array in entries.arrays(adapter).items():
        entry["arrays"][field]["digest"] = digests.of(digests.on_host(array))
    return entry


def seals(index: dict[str, Any]) -> dict[str, Any]:
    """Returns a digest of every field of an index; of tables one of every item.

    Example:
      >>> seals({"format": 1, "base": None, "digests": {}}).keys()
      dict_keys(['format', 'base'])
    """
    found: dict[str, Any] = {}
    for field, value in index.items():
        if isinstance(value, dict):
            found[field] = {k: record.digest([field, k, v]) for k, v in value.items()}
        else:
            found[field] = record.digest([field, value])
    found.pop("digests", None)
    return found


def _fingerprint(adapters: Adapters, params: PyTree) -> dict[str, Any]:
    leaves = tree.flatten(params)
    tree.require(adapters, leaves, "parameter tree")
    for name, adapter in adapters.items():
        adapter.check(name, leaves[name])
    return {name: _seal(leaves[name]) for name in adapters}


def _seal(leaf: Any) -> dict[str, Any]:
    if not tree.is_concrete(leaf):
        return entries.kind(leaf) | {"sha256": None}
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    data = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
    return entries.kind(leaf) | {"sha256": hashlib.sha256(data.data).hexdigest()}


# Reading


def _read_index(folder: epath.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The index, of which every field has been checked, and the abstract adapters."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no directory {folder}")
    place = folder / INDEX
    if not place.exists():
        raise ValueError(
            f"{folder} has no {INDEX}: another kind of checkpoint, or one whose saving "
            "was cut short"
        )
    try:
        index = untrusted.parsed(place.read_text())
        if untrusted.field(index, "format", FIELDS["format"]) <= FORMAT:
            _require_form(index)
    except ValueError as error:
        raise ValueError(f"{place} is damaged: {error}") from error
    if index["format"] > FORMAT:  # the rest may look otherwise
        raise ValueError(
            f"{place} has format {index['format']} of {index.get('library')}; this "
            f"lorax reads up to {FORMAT}: upgrade lorax"
        )
    skeletons = {}
    for path, entry in index["adapters"].items():
        try:
            skeletons[path] = entries.skeleton(entry)
        except ValueError as error:
            raise ValueError(
                f"{place}: {path}: its entry does not fit this lorax: {error}; if a "
                "newer lorax wrote it, upgrade, else the file is damaged"
            ) from error
    if damaged := _unsealed(index):
        raise ValueError(
            f"{place} is damaged: {damaged} is not what was written, by its digest"
        )
    return index, skeletons


def _require_form(index: dict[str, Any]) -> None:
    """Raises ValueError unless all fields but the adapters' own are what they must."""
    for field, rule in FIELDS.items():
        untrusted.field(index, field, rule)
    if "digests" in index:
        untrusted.field(index, "digests", untrusted.TABLE)
    base = index["base"]
    for path, seal in (base or {}).items():
        for field, rule in BASE.items():
            untrusted.field(seal, field, rule, f"base.{path}")
    if base is not None and (odd := sorted(base.keys() ^ index["adapters"].keys())):
        raise ValueError(f"only one of base and adapters has {odd[0]!r}")


def _unsealed(index: dict[str, Any]) -> str:
    """The first field that is not what its digest says, or ""; the oldest have none."""
    if "digests" not in index:
        return ""
    then, now = index["digests"], seals(index)
    for field in [*then, *now]:
        old, new = then.get(field), now.get(field)
        if not isinstance(old, dict) or not isinstance(new, dict):
            if old != new:
                return field
            continue
        for name in [*old, *new]:
            if old.get(name) != new.get(name):
                return f"{field}.{name}"
    return ""


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


def _read_arrays(folder: epath.Path, skeletons: Adapters) -> dict[str, Any]:
    """The arrays as numpy, so that they load whatever devices they were saved from."""
    want = {item_name(name): entries.arrays(a) for name, a in skeletons.items()}
    restore = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), want)
    kind = entries.kind
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            args = ocp.args.PyTreeRestore(restore_args=restore)
            arrays = checkpointer.restore(folder, args=args)
        same = jax.tree.map(lambda x, w: kind(x) == kind(w), arrays, want)
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


def _verify(where: str, told: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Holds the arrays of an adapter against their digests; the oldest have none."""
    for field, kind in told.items():
        if "digest" in kind and digests.of(arrays[field]) != kind["digest"]:
            raise ValueError(f"{where}/{field} is damaged: its digest is another")
