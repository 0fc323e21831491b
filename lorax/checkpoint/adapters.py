"""Adapters on disk: arrays in orbax, everything else in `adapters.json`.

`index` builds and reads that file, which is written last and replaced atomically. A
directory without it is not a checkpoint, and overwriting keeps the old arrays until the
new ones are complete.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from lorax.checkpoint import digests, entries, folders, storage
from lorax.checkpoint import index as indices
from lorax.types import Adapters, PyTree


def save_adapters(
    path: str | os.PathLike[str],
    adapters: Adapters,
    params: PyTree = None,
    *,
    overwrite: bool = False,
) -> None:
    """Writes adapters to a directory; loading them needs no template.

    Args:
      path: the directory, local or anything orbax writes to (`gs://...`).
      adapters: `{path: Adapter}`.
      params: the base they belong to, after `lorax.init` (an init may move part of a
        kernel). Only a fingerprint is stored: shape, dtype and content digest of each
        adapted leaf, so that loading can detect a different base. None stores none.
        For a `Base`, the frozen arrays that the adapters use are stored in full; see
        `load_frozen`.
      overwrite: replace an existing checkpoint; refused if a value is not finite.

    Raises:
      FileExistsError: there is already a checkpoint, and `overwrite` is False.
      ValueError: `adapters` is empty or does not fit `params`, `params` lacks frozen
        arrays that the adapters use, a static field is out of range, or non-finite
        adapters would replace a checkpoint.
      KeyError: `params` lacks an adapted path.
      TypeError: an adapter's class is not registered, or JSON cannot represent a
        static field.
      OSError: the directory cannot be written (no space left, no permission); its
        previous contents are intact.

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
    folder = storage.folder_of(path)
    folders.require_directory(folder)
    if not adapters:
        raise ValueError("adapters is empty: there is nothing to save")
    frozen = indices.frozen_of(adapters, params)
    if (folder / indices.INDEX).exists():
        if not overwrite:
            raise FileExistsError(
                f"{folder} already holds adapters; pass overwrite=True to replace them"
            )
        _require_finite(folder, adapters)
    generation = max(_generations(folder), default=-1) + 1
    index = indices.describe(adapters, params, frozen, generation)
    arrays = {name: entries.arrays(a) for name, a in adapters.items()}
    _write(folder, index, {"arrays": arrays, "frozen": frozen})
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("lorax.checkpoint.save_adapters")


def load_adapters(
    path: str | os.PathLike[str],
    template: Adapters | None = None,
    params: PyTree = None,
) -> Adapters:
    """Reads what `save_adapters` wrote, bit for bit, static fields included.

    Args:
      path: the directory.
      template: adapters with the expected paths, classes, static fields, shapes and
        dtypes (arrays or `jax.ShapeDtypeStruct`); the loaded arrays take its shardings.
        None accepts whatever is there and puts it on the default device.
      params: the base the adapters will be applied to, checked against the
        fingerprint; for a `Base`, its frozen arrays too. None skips this check.

    Returns:
      `{path: Adapter}`; arrays kept in `Base.frozen` come from `load_frozen`.

    Raises:
      FileNotFoundError: no such directory.
      ValueError: the directory holds no adapter checkpoint, a damaged one or one in a
        newer format; or the template or base differs (the error names the path and the
        difference).
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
    folder = storage.folder_of(path)
    index, skeleton = indices.read(folder)
    try:
        if template is not None:
            skeleton = entries.filled(skeleton, index["adapters"], template)
            entries.check_template(skeleton, template)
        if params is not None:
            indices.require_base(index, skeleton, params)
    except ValueError as error:
        raise ValueError(f"{folder / indices.INDEX}: {error}") from error
    place = folder / f"arrays-{index['generation']}"
    arrays = _read(place, {name: entries.arrays(a) for name, a in skeleton.items()})
    for name, entry in index["adapters"].items():
        digests.require_intact(f"{place}: {name}/", entry["arrays"], arrays[name])
    loaded: dict[str, Any] = dict(skeleton)
    for name, adapter in skeleton.items():
        places = {}
        like = template[name] if template else adapter
        for field, leaf in entries.arrays(like).items():
            places[field] = getattr(leaf, "sharding", None)
        loaded[name] = loaded[name].replace(**jax.device_put(arrays[name], places))
    return loaded


def load_frozen(path: str | os.PathLike[str]) -> dict[str, jax.Array]:
    """Reads the frozen arrays that `save_adapters` wrote next to the adapters.

    For these adapters,

        params = lorax.Base(params, load_frozen(path))

    restores the base that `lorax.init` returned.

    Args:
      path: the directory.

    Returns:
      `{name: array}`, bit for bit, on the default device; `{}` if the adapters have
      none.

    Raises:
      FileNotFoundError: no such directory.
      ValueError: the directory holds no adapter checkpoint, a damaged one or one in a
        newer format.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> from lorax.adapters import Full
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_adapters(folder, {"bias": Full(jnp.zeros(2))})
      ...     load_frozen(folder)
      {}
    """
    folder = storage.folder_of(path)
    index, _ = indices.read(folder)
    told = index.get("frozen", {})
    if not told:
        return {}
    place = folder / f"frozen-{index['generation']}"
    arrays = _read(place, {n: entries.abstract(n, entry) for n, entry in told.items()})
    digests.require_intact(f"{place}: ", told, arrays)
    return jax.device_put(arrays)


# Writing


def _write(
    folder: epath.Path, index: indices.Index, parts: Mapping[str, dict[str, Any]]
) -> None:
    """Writes the arrays, then the index atomically, then deletes older arrays."""
    text = json.dumps(index, indent=1, allow_nan=False)
    with _writing(folder):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            for part, arrays in parts.items():
                if arrays:
                    target = folder / f"{part}-{index['generation']}"
                    given = storage.to_write(arrays)
                    checkpointer.save(target, args=ocp.args.PyTreeSave(given))
        if jax.process_index() == 0:
            place = folder / f"{indices.INDEX}.part"
            place.write_text(text)
            place.replace(folder / indices.INDEX)
    if jax.process_index() == 0:
        for stale in set(_generations(folder)) - {index["generation"]}:
            for part in parts:
                (folder / f"{part}-{stale}").rmtree(missing_ok=True)


@contextlib.contextmanager
def _writing(folder: epath.Path) -> Iterator[None]:
    """Names the directory in any error that orbax or tensorstore raises."""
    try:
        yield
    except Exception as error:
        raise OSError(
            f"{folder} could not be written: {storage.reason(error)}. Any adapters it "
            "already held are intact; free some space or fix the permissions, then "
            "save again"
        ) from error


def _require_finite(folder: epath.Path, adapters: Adapters) -> None:
    """ValueError naming a leaf with NaN or an infinity; it may replace a good one."""
    for name, adapter in adapters.items():
        for field, value in entries.arrays(adapter).items():
            if not storage.on_host(storage.is_finite(value)):
                raise ValueError(
                    f"{name}: {field} is not finite, and {folder} holds adapters that "
                    "may be good: save to another directory, or delete that one first"
                )


def _generations(folder: epath.Path) -> list[int]:
    """The generation numbers of the array folders, complete or not."""
    names = [p.name.removeprefix("arrays-") for p in folder.glob("arrays-*")]
    return [int(name) for name in names if name.isdecimal()]


# Reading


def _read(folder: epath.Path, want: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays, as from `storage.read`; ValueError if JAX would round them."""
    arrays = storage.read(folder, want)
    for leaf in jax.tree.leaves(arrays):
        if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
            raise ValueError(
                f"the arrays in {folder} are {leaf.dtype}, which JAX would round: set "
                "jax.config.update('jax_enable_x64', True) before loading"
            )
    return arrays
