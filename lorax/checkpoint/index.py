"""The index of saved adapters, `adapters.json`: its form, its digests, its reading.

    path/adapters.json   {"format": 1, "library": ..., "generation": n,
                          "adapters": {path: {class, static fields; of every array
                          shape, dtype and digest}},
                          "base": {path: {shape, dtype, sha256}} or null,
                          "frozen": {name: {shape, dtype, digest}}, if there are any,
                          "digests": of every field above; of tables by path or name}
    path/arrays-n/       orbax: {path: {field: array}}
    path/frozen-n/       orbax: {name: array}, if there are any

It is data: reading it runs no code and imports nothing. Every field is held to its type
and range, and to its digest, before an array is read; every array is then held to its
own. (Older files have no digests, and load as well.)
"""

from __future__ import annotations

from typing import Any

from etils import epath

from lorax import untrusted
from lorax.checkpoint import entries, record

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
FROZEN = {
    "shape": untrusted.SHAPE,
    "dtype": untrusted.TEXT,
    "digest": untrusted.digits(32),
}


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


def read_index(folder: epath.Path) -> tuple[dict[str, Any], dict[str, Any]]:
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


def _require_form(index: dict[str, Any]) -> None:
    """Raises ValueError unless all fields but the adapters' own are what they must."""
    for field, rule in FIELDS.items():
        untrusted.field(index, field, rule)
    if "digests" in index:
        untrusted.field(index, "digests", untrusted.TABLE)
    for name, told in untrusted.field(
        {"frozen": {}, **index}, "frozen", untrusted.TABLE
    ).items():
        for field, rule in FROZEN.items():
            untrusted.field(told, field, rule, f"frozen.{name}")
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
