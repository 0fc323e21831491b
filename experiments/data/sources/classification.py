"""Sentences or sentence pairs with a label or a number: tables, GLUE, small sets.

An example is a dict of numpy arrays, see `batches.labelled`:

    tokens: int32 [length]    with the tokenizer's special tokens around sentences
    label:  int32 or float32 []
"""

import math
import os
import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from experiments.data import tokenization
from experiments.data.examples import Encoded, Example
from experiments.data.sources import records


class Columns(NamedTuple):
    """Where a table has its sentences and its label."""

    first: str = "sentence"
    second: str | None = None
    label: str = "label"


class Labelled(NamedTuple):
    """One row."""

    first: str
    second: str | None
    label: int | float  # index in `Data.labels`; a number if those are empty
    where: str = ""  # "file:line"


class Data(NamedTuple):
    """Rows, and the names of their labels; empty if labels are numbers."""

    rows: tuple[Labelled, ...]
    labels: tuple[str, ...]
    malformed: tuple[str, ...] = ()


NUMBERS: tuple[str, ...] = ()  # `labels` of a regression


def read(
    path: str | os.PathLike[str],
    columns: Columns | None = None,
    labels: Sequence[str] | None = None,
    header: Sequence[str] | None = None,
) -> Data:
    """Reads a table of labelled sentences.

    Args:
      path: see `records.read`.
      columns: names in the table; "sentence" and "label" by default.
      labels: names of the classes in the order of their numbers, as in the training
        set; `NUMBERS` if labels are numbers; None for all that occur, sorted by name.
      header: see `records.read`.

    Raises:
      ValueError: no row is good, see `records.read`. A row whose label is not one of
        `labels`, or not a finite number, is malformed.
    """
    columns = columns or Columns()
    needed = [name for name in columns if name is not None]

    def use(row: records.Row) -> records.Row:
        values = {name: str(row.values[name]).strip() for name in needed}
        for name in needed[:-1]:
            if not values[name]:
                raise records.MalformedRow(f"{name!r} is empty")
        _require_label(values[columns.label], columns.label, labels)
        return records.Row(row.where, values)

    found = records.read(path, columns=needed, header=header, use=use)
    if labels is None:
        labels = sorted({row.values[columns.label] for row in found.rows})
    place = {name: i for i, name in enumerate(labels)}
    rows = (
        Labelled(
            row.values[columns.first],
            row.values[columns.second] if columns.second else None,
            place[row.values[columns.label]]
            if place
            else float(row.values[columns.label]),
            row.where,
        )
        for row in found.rows
    )
    return Data(tuple(rows), tuple(labels), found.malformed)


def encode(
    tokenizer: tokenization.Tokenizer,
    data: Data,
    max_length: int,
    source: str,
) -> Encoded:
    """Returns examples of labelled sentences, truncated to `max_length` tokens.

    A sentence that is too long loses its end, but keeps the final special token. No row
    is dropped, so scores are over all rows; a warning says how many were truncated.
    """
    kept: list[Example] = []
    kind = np.int32 if data.labels else np.float32
    truncated = 0
    for row in data.rows:
        ids = tokenizer.encode_classified(row.first, row.second)
        if len(ids) > max_length:
            truncated += 1
            ids = [*ids[: max_length - 1], ids[-1]]
        label = np.asarray(row.label, kind)
        kept.append({"tokens": np.asarray(ids, np.int32), "label": label})
    if truncated:
        warnings.warn(
            f"{source}: cut {truncated} of {len(kept)} examples to {max_length} tokens",
            stacklevel=2,
        )
    return Encoded(kept, truncated)


def counts(rows: Iterable[Labelled], labels: Sequence[str]) -> dict[str, int]:
    """Counts the rows of each label, which give the accuracy of a constant guess."""
    found = [0] * len(labels)
    for row in rows:
        found[int(row.label)] += 1
    return dict(zip(labels, found, strict=True))


def _require_label(text: str, column: str, labels: Sequence[str] | None) -> None:
    """Checks that a label is in `labels` or, if those are empty, a finite number."""
    if labels is None:
        if not text:
            raise records.MalformedRow(f"{column!r} is empty")
    elif labels:
        if text not in labels:
            some = ", ".join(map(repr, labels[:8])) + ", ..." * (len(labels) > 8)
            raise records.MalformedRow(f"{column!r} is {text!r}, not one of {some}")
    else:
        try:
            finite = math.isfinite(float(text))
        except ValueError:
            finite = False
        if not finite:
            raise records.MalformedRow(f"{column!r} is {text!r}, not a finite number")
