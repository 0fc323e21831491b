"""Adapters on disk: arrays in orbax, everything else in `adapters.json`.

`index` has the form of that file, which is written last and replaced in one move. A
directory without it is not a checkpoint, and overwriting keeps the old arrays until the
new ones are complete.
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

from lorax import tree
from lorax.checkpoint import digests, entries, folders
from lorax.checkpoint import index as indices
from lorax.checkpoint.entries import item_name
from lorax.types import Adapters, PyTree


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
        adapted leaf, by which loading tells another base. None stores none. Of a `Base`
        the frozen arrays that the adapters have are stored whole, see `load_frozen`.
      overwrite: replace the checkpoint that is there; not by NaN or an infinity.

    Raises:
      FileExistsError: there is one, and `overwrite` is False.
      ValueError: no adapters, ones that do not fit `params`, ones with frozen arrays
        and `params` without them, a static field out of its range, or adapters that
        are not finite and would replace a checkpoint.
      KeyError: `params` lacks an adapted path.
      TypeError: an adapter whose class is not registered, or a static field that JSON
        cannot hold.
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
    frozen = _frozen_of(adapters, params)
    if (folder / indices.INDEX).exists():
        if not overwrite:
            raise FileExistsError(
                f"{folder} holds adapters already; pass overwrite=True to replace them"
            )
        _require_finite(folder, adapters)
    index = {
        "format": indices.FORMAT,
        "library": f"lorax {_version()}",
        "generation": max(_generations(folder), default=-1) + 1,
        "adapters": {name: _entry(name, a) for name, a in adapters.items()},
        "base": None if params is None else _fingerprint(adapters, params),
    }
    if frozen:
        index["frozen"] = {name: _described(x) for name, x in frozen.items()}
    index["digests"] = indices.seals(index)
    text = json.dumps(index, indent=1, allow_nan=False)
    parts: dict[str, dict[str, Any]] = {
        "arrays": {item_name(name): entries.arrays(a) for name, a in adapters.items()},
        "frozen": {item_name(name): x for name, x in frozen.items()},
    }
    with _writing(folder):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            for part, arrays in parts.items():
                if arrays:
                    target = folder / f"{part}-{index['generation']}"
                    checkpointer.save(target, args=ocp.args.PyTreeSave(arrays))
        if jax.process_index() == 0:
            written = folder / f"{indices.INDEX}.part"
            written.write_text(text)
            written.replace(folder / indices.INDEX)
    if jax.process_index() == 0:
        for stale in set(_generations(folder)) - {index["generation"]}:
            for part in parts:
                (folder / f"{part}-{stale}").rmtree(missing_ok=True)
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
      params: the base the adapters will be applied to, held against the fingerprint;
        of a `Base` the frozen arrays as well. None leaves the base unchecked.

    Returns:
      `{path: Adapter}`; what they have in `Base.frozen` is `load_frozen`'s.

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
    index, skeleton = indices.read_index(folder)
    try:
        if template is not None:
            skeleton = entries.filled(skeleton, index["adapters"], template)
            entries.check_template(skeleton, template)
        if params is not None:
            _check_base(skeleton, index["base"] or {}, params)
            _check_frozen(index.get("frozen", {}), params)
    except ValueError as error:
        raise ValueError(f"{folder / indices.INDEX}: {error}") from error
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


def load_frozen(path: str | os.PathLike[str]) -> dict[str, jax.Array]:
    """Reads the frozen arrays that `save_adapters` wrote beside adapters.

        params = lorax.Base(params, load_frozen(path))

    is then what `lorax.init` returned, of these adapters.

    Args:
      path: the directory.

    Returns:
      `{name: array}`, the same bits, on the default device; `{}` where the adapters
      have none.

    Raises:
      FileNotFoundError: no such directory.
      ValueError: no adapter checkpoint, a damaged one or one of a newer format.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> from lorax.adapters import Full
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_adapters(folder, {"bias": Full(jnp.zeros(2))})
      ...     load_frozen(folder)
      {}
    """
    folder = folder_of(path)
    index, _ = indices.read_index(folder)
    told = index.get("frozen", {})
    if not told:
        return {}
    place = folder / f"frozen-{index['generation']}"
    arrays = _read_tree(
        place, {item_name(n): entries.abstract(n, k) for n, k in told.items()}
    )
    found = {name: arrays[item_name(name)] for name in told}
    _verify(str(place), told, found)
    return jax.device_put(found)


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


def _frozen_of(adapters: Adapters, params: PyTree) -> dict[str, Any]:
    """The frozen arrays that the adapters have; ValueError where params have not."""
    (_, held), lent = tree.split(params), entries.lent_names(adapters)
    if lacking := sorted(lent.keys() - held.keys()):
        path = lent[lacking[0]]
        raise ValueError(
            f"{path}: {type(adapters[path]).__name__} has the frozen array "
            f"{lacking[0]!r}, without which it could not be used again, and params "
            f"{'lack it' if held else 'are not a Base'}: write save_adapters(path, "
            "adapters, base), base what lorax.init returned, or lorax.Base(params, "
            "frozen)"
        )
    return {name: held[name] for name in sorted(lent)}


def _described(array: Any) -> dict[str, Any]:
    return entries.kind(array) | {"digest": digests.of(digests.on_host(array))}


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


def _check_frozen(told: dict[str, Any], params: PyTree) -> None:
    """Raises ValueError for a Base with other frozen arrays than those saved."""
    for name, now in tree.split(params)[1].items():
        if name in told and tree.is_concrete(now) and _described(now) != told[name]:
            raise ValueError(
                f"the adapters were made with another frozen array {name!r} than that "
                "of params; pass lorax.Base(params, checkpoint.load_frozen(path))"
            )


def _read_arrays(folder: epath.Path, skeletons: Adapters) -> dict[str, Any]:
    """The arrays of adapters, by item name."""
    want = {item_name(name): entries.arrays(a) for name, a in skeletons.items()}
    return _read_tree(folder, want)


def _read_tree(folder: epath.Path, want: dict[str, Any]) -> dict[str, Any]:
    """The arrays as numpy, so that they load whatever devices they were saved from."""
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
        raise ValueError(
            f"the arrays in {folder} do not fit {indices.INDEX}: both are damaged"
        )
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
