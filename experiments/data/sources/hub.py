"""Rows of Hugging Face datasets: from a directory on disk, or a name on the hub."""

import pathlib
from collections.abc import Iterator
from typing import Any

from experiments.data import extras

PREFIX = "hf:"


def rows(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields `(where, values)` of each row; class labels become their names.

    Args:
      name: "hf:PATH_OR_NAME:SPLIT", such as "hf:stanfordnlp/sst2:train", with
        "NAME/CONFIG" written as "NAME@CONFIG"; a path is a directory that
        `save_to_disk` wrote.

    Raises:
      ValueError: the name has another form, or there is no such split.
      ImportError: `datasets` is not installed.
    """
    where, _, split = name.removeprefix(PREFIX).rpartition(":")
    if not where or not split:
        raise ValueError(
            f"{name!r}: expected 'hf:PATH_OR_NAME:SPLIT', such as "
            "'hf:stanfordnlp/sst2:train'."
        )
    data = _load(where, split)
    for i, row in enumerate(data):
        yield f"{name}[{i}]", {k: _named(data.features[k], v) for k, v in row.items()}


def _load(where: str, split: str) -> Any:
    """Loads one split of a dataset."""
    library = extras.require("datasets", "interop", f"Reading {where}")
    if not pathlib.Path(where).is_dir():
        name, _, config = where.partition("@")
        return library.load_dataset(name, config or None, split=split)
    loaded = library.load_from_disk(where)
    if not isinstance(loaded, library.DatasetDict):
        return loaded
    if split not in loaded:
        raise ValueError(f"{where} has no split {split!r}; it has {sorted(loaded)}.")
    return loaded[split]


def _named(feature: Any, value: Any) -> Any:
    """Returns the name of a class label; None for -1, which means no label."""
    if not hasattr(feature, "int2str") or value is None:
        return value
    return None if value < 0 else feature.int2str(value)
