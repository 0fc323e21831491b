"""Sentences, or pairs of them, with a label or a number: tables, GLUE, small sets.

An example is a dict of numpy arrays, see `batches.labelled`:

    tokens: int32 [length]    with the marks that the tokenizer puts around sentences
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
    label: int | float  # place in `Data.labels`; a number if those are empty
    where: str = ""  # "file:line"


class Data(NamedTuple):
    """Rows, and the names of their labels; none if the label is a number."""

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
      labels: names of the classes in the order of their numbers, as the training set
        has them; `NUMBERS` if the label is a number; None to take all that occur, in
        order of name.
      header: see `records.read`.

    Raises:
      ValueError: if no row is good, see `records.read`. A row whose label is none of
        `labels`, or no finite number, is malformed.
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
    """Examples of labelled sentences, cut to `max_length` tokens.

    What is too long loses its end, but keeps the token that marks it. No row is
    dropped, so scores are over all rows; how many were cut is counted, and a warning
    says so.
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
    """How many rows each label has: the accuracy of always guessing one of them."""
    found = [0] * len(labels)
    for row in rows:
        found[int(row.label)] += 1
    return dict(zip(labels, found, strict=True))


def _require_label(text: str, column: str, labels: Sequence[str] | None) -> None:
    """A label is one of those given, or a finite number where none are."""
    if labels is None:
        if not text:
            raise records.MalformedRow(f"{column!r} is empty")
    elif labels:
        if text not in labels:
            some = ", ".join(map(repr, labels[:8])) + ", ..." * (len(labels) > 8)
            raise records.MalformedRow(f"{column!r} is {text!r}, none of {some}")
    else:
        try:
            finite = math.isfinite(float(text))
        except ValueError:
            finite = False
        if not finite:
            raise records.MalformedRow(f"{column!r} is {text!r}, no finite number")
