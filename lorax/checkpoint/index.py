"""The description of saved adapters, `adapters.json`: building, comparing, reading it.

    path/adapters.json   {"format": 2, "library": ..., "generation": n,
                          "adapters": {path: {class, static fields; shape, dtype and
                          content of every array}},
                          "base": {path: {shape, dtype, content}} or null,
                          "frozen": {name: {shape, dtype, content}}, if there are any,
                          "digests": of every field above; tables by path or name}
    path/arrays-n/       orbax: {path: {field: array}}
    path/frozen-n/       orbax: {name: array}, if there are any

It is data: reading it runs no code and imports nothing. The type, range and digest of
every field are checked before any array is read; then every array is checked against
its entry. (Files of format 1 have other checksums, see `digests`, or none.)
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
"""The rules for the fields of the index; other fields are allowed and sealed too."""
Index = dict[str, Any]
"""The content of the file: JSON data."""


# Building it


def describe(
    adapters: Adapters,
    params: PyTree,
    frozen: Mapping[str, jax.Array],
    generation: int,
) -> Index:
    """Returns the index of adapters about to be saved, checked to be loadable.

    Args:
      adapters: `{path: Adapter}`.
      params: the base they belong to, or None.
      frozen: the frozen arrays that they use.
      generation: the number in the names of the array folders.

    Raises:
      ValueError: the adapters do not fit `params`, or could not be loaded again.
      KeyError: `params` lacks an adapted path.
      TypeError: an adapter's class is not registered, or JSON cannot represent a
        static field.
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
    """The frozen arrays that the adapters use; ValueError if params lack one."""
    (_, held), lent = tree.split(params), entries.lent_names(adapters)
    if lacking := sorted(lent.keys() - held.keys()):
        path = lent[lacking[0]]
        raise ValueError(
            f"{path}: {type(adapters[path]).__name__} needs the frozen array "
            f"{lacking[0]!r} to be usable again, but params "
            f"{'lack it' if held else 'are not a Base'}: write save_adapters(path, "
            "adapters, base), where base is what lorax.init returned, or "
            "lorax.Base(params, frozen)"
        )
    return {name: held[name] for name in sorted(lent)}


def _version() -> str:
    try:
        return metadata.version("lorax-flax")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _entry(path: str, adapter: Any) -> dict[str, Any]:
    """An adapter's entry, checked to be loadable, with its arrays' digests."""
    entry = entries.describe(path, adapter)
    try:
        entries.skeleton(entry)
    except ValueError as error:
        raise ValueError(f"{path} could not be loaded again: {error}") from error
    return entry | {"arrays": digests.describe(entries.arrays(adapter))}


def _adapted(adapters: Adapters, params: PyTree) -> dict[str, Any]:
    """The adapted leaves, once the adapters are known to fit them."""
    leaves = tree.flatten(params)
    tree.require(adapters, leaves, "parameter tree")
    for name, adapter in adapters.items():
        if not tree.is_coded(leaves[name]):
            adapter.check(name, leaves[name])
    return {name: leaves[name] for name in adapters}


def seals(index: Index) -> dict[str, Any]:
    """Returns a digest of every field of an index; for a table, one for each item.

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
    """Raises ValueError if the adapters belong to a base other than `params`.

    Args:
      index: as it was read.
      adapters: its abstract adapters.
      params: the current base; the frozen arrays of a `Base` are compared too.
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
                f"the adapters were made with a frozen array {name!r} that differs "
                "from that of params; pass lorax.Base(params, "
                "checkpoint.load_frozen(path))"
            )


# Reading it


def read(folder: epath.Path) -> tuple[Index, Adapters]:
    """Returns the index, every field checked, and the abstract adapters."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no directory {folder}")
    place = folder / INDEX
    if not place.exists():
        raise ValueError(
            f"{folder} has no {INDEX}: it is another kind of checkpoint, or saving it "
            "was interrupted"
        )
    try:
        index = untrusted.parsed(place.read_text())
        if untrusted.field(index, "format", FIELDS["format"]) <= FORMAT:
            _require_form(index)
    except ValueError as error:
        raise ValueError(f"{place} is damaged: {error}") from error
    if index["format"] > FORMAT:  # the rest may be laid out differently
        raise ValueError(
            f"{place} has format {index['format']} of {index.get('library')}; this "
            f"lorax reads formats up to {FORMAT}: upgrade lorax"
        )
    skeletons: Adapters = {}
    for path, entry in index["adapters"].items():
        try:
            skeletons[path] = entries.skeleton(entry)
        except ValueError as error:
            raise ValueError(
                f"{place}: {path}: this lorax cannot read its entry: {error}; if a "
                "newer lorax wrote it, upgrade; otherwise the file is damaged"
            ) from error
    both = entries.lent_names(skeletons).keys() ^ index.get("frozen", {}).keys()
    if both:
        raise ValueError(
            f"{place} is damaged: the array {min(both)!r} is in only one of adapters "
            "and frozen"
        )
    if damaged := _unsealed(index):
        raise ValueError(f"{place} is damaged: {damaged} does not match its digest")
    return index, skeletons


def _require_form(index: Index) -> None:
    """Raises ValueError unless all fields except the adapters' own are valid."""
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
        raise ValueError(f"{odd[0]!r} is in only one of base and adapters")


def _unsealed(index: Index) -> str:
    """The first field that does not match its digest, or ""; oldest files have none."""
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
