"""The description of saved adapters, `adapters.json`: making, reading, comparing it.

    path/adapters.json   {"format": 2, "library": ..., "generation": n,
                          "adapters": {path: {class, static fields; of every array
                          shape, dtype and content}},
                          "base": {path: {shape, dtype, content}} or null,
                          "frozen": {name: {shape, dtype, content}}, if there are any,
                          "digests": of every field above; of tables by path or name}
    path/arrays-n/       orbax: {path: {field: array}}
    path/frozen-n/       orbax: {name: array}, if there are any

It is data: reading it runs no code and imports nothing. Every field is held to its type
and range, and to its digest, before an array is read; every array is then held to its
entry. (Files of format 1 have other sums, see `digests`; the oldest have none.)
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax
from etils import epath

from lorax import tree, untrusted
from lorax.checkpoint import digests, entries, record
from lorax.types import Adapters, PyTree

FORMAT = 2
INDEX = "adapters.json"
FIELDS = {
    "format": untrusted.whole(1),
    "library": untrusted.TEXT,
    "generation": untrusted.whole(),
    "adapters": untrusted.mapping(untrusted.ANY, 1),
    "base": untrusted.TABLE | None,
}
"""What the fields of the index must be; it may have others, which are sealed too."""
Index = dict[str, Any]
"""What is in the file: JSON data."""


# Making it


def describe(
    adapters: Adapters,
    params: PyTree,
    frozen: Mapping[str, jax.Array],
    generation: int,
) -> Index:
    """Returns the index of adapters that are about to be saved; it is sure to load.

    Args:
      adapters: `{path: Adapter}`.
      params: the base they belong to, or None.
      frozen: the frozen arrays that they have.
      generation: number of the folders of arrays.

    Raises:
      ValueError: adapters that do not fit `params`, or could not be loaded again.
      KeyError: `params` lacks an adapted path.
      TypeError: an adapter of a class that is not registered, or a static field that
        JSON cannot hold.
    """
    base = None if params is None else _adapted(adapters, params)
    index = {
        "format": FORMAT,
        "library": f"lorax {_version()}",
        "generation": generation,
        "adapters": {name: _entry(name, a) for name, a in adapters.items()},
        "base": None if base is None else digests.describe(base),
    }
    if frozen:
        index["frozen"] = digests.describe(frozen)
    return index | {"digests": seals(index)}


def frozen_of(adapters: Adapters, params: PyTree) -> dict[str, jax.Array]:
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


def _version() -> str:
    try:
        return metadata.version("lorax-flax")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _entry(path: str, adapter: Any) -> dict[str, Any]:
    """An adapter's entry, which is sure to load, with what its arrays hold."""
    entry = entries.describe(path, adapter)
    try:
        entries.skeleton(entry)
    except ValueError as error:
        raise ValueError(f"{path} could not be loaded again: {error}") from error
    return entry | {"arrays": digests.describe(entries.arrays(adapter))}


def _adapted(adapters: Adapters, params: PyTree) -> dict[str, Any]:
    """The leaves that adapters belong to, which they fit; of a kernel its codes."""
    leaves = tree.flatten(params)
    tree.require(adapters, leaves, "parameter tree")
    for name, adapter in adapters.items():
        if not tree.is_coded(leaves[name]):
            adapter.check(name, leaves[name])
    return {name: leaves[name] for name in adapters}


def seals(index: Index) -> dict[str, Any]:
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


# Comparing it


def require_base(index: Index, adapters: Adapters, params: PyTree) -> None:
    """Raises ValueError for params that are not those that the adapters belong to.

    Args:
      index: as it was read.
      adapters: the abstract adapters of it.
      params: the base at hand; of a `Base` the frozen arrays are compared as well.
    """
    then: dict[str, digests.Entry] = index["base"] or {}
    now = {
        path: digests.describe_as(then.get(path, {}), leaf)
        for path, leaf in _adapted(adapters, params).items()
    }
    digests.require_base(then, now, "the adapters were made for another base")
    told: dict[str, digests.Entry] = index.get("frozen", {})
    for name, array in tree.split(params)[1].items():
        if name in told and digests.difference(
            told[name], digests.describe_as(told[name], array)
        ):
            raise ValueError(
                f"the adapters were made with another frozen array {name!r} than that "
                "of params; pass lorax.Base(params, checkpoint.load_frozen(path))"
            )


# Reading it


def read(folder: epath.Path) -> tuple[Index, Adapters]:
    """Returns the index, with every field checked, and the abstract adapters."""
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
    skeletons: Adapters = {}
    for path, entry in index["adapters"].items():
        try:
            skeletons[path] = entries.skeleton(entry)
        except ValueError as error:
            raise ValueError(
                f"{place}: {path}: its entry does not fit this lorax: {error}; if a "
                "newer lorax wrote it, upgrade, else the file is damaged"
            ) from error
    both = entries.lent_names(skeletons).keys() ^ index.get("frozen", {}).keys()
    if both:
        raise ValueError(
            f"{place} is damaged: only one of adapters and frozen has the array "
            f"{min(both)!r}"
        )
    if damaged := _unsealed(index):
        raise ValueError(
            f"{place} is damaged: {damaged} is not what was written, by its digest"
        )
    return index, skeletons


def _require_form(index: Index) -> None:
    """Raises ValueError unless all fields but the adapters' own are what they must."""
    for field, rule in FIELDS.items():
        untrusted.field(index, field, rule)
    if "digests" in index:
        untrusted.field(index, "digests", untrusted.TABLE)
    for name, told in untrusted.field(
        {"frozen": {}, **index}, "frozen", untrusted.TABLE
    ).items():
        digests.require_form(told, f"frozen.{name}")
    base = index["base"]
    for path, told in (base or {}).items():
        digests.require_form(told, f"base.{path}", abstract=True)
    if base is not None and (odd := sorted(base.keys() ^ index["adapters"].keys())):
        raise ValueError(f"only one of base and adapters has {odd[0]!r}")


def _unsealed(index: Index) -> str:
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
