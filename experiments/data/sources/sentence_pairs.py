"""Pairs of texts that mean the same: rows of a table, or sentences with the same label.

An example is a dict of numpy arrays, see `collate`:

    tokens:   int32 [length]  the longer of the two, which determines the row's bucket
    anchor:   int32 [length]
    positive: int32 [length]
    group:    int32 []        rows of one group are not each other's negatives
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.data import batches, tokenization
from experiments.data.examples import Encoded, Example
from experiments.data.sources import classification, records

COLUMNS = ("anchor", "positive")
"""The columns, as sentence-transformers names them."""


class Pair(NamedTuple):
    """Two texts, and the number of their group."""

    anchor: str
    positive: str
    group: int


def read(path: str | os.PathLike[str]) -> list[Pair]:
    """Reads a table's "anchor" and "positive"; pairs that share a text are one group.

    Args:
      path: see `records.read`.

    Raises:
      ValueError: no row is good; a row with an empty text is malformed.
    """

    def use(row: records.Row) -> records.Row:
        values = {name: str(row.values[name]).strip() for name in COLUMNS}
        for name, text in values.items():
            if not text:
                raise records.MalformedRow(f"{name!r} is empty")
        return records.Row(row.where, values)

    rows = records.read(path, columns=COLUMNS, use=use).rows
    texts = [(row.values["anchor"], row.values["positive"]) for row in rows]
    groups = _joined(texts)
    return [Pair(*both, group) for both, group in zip(texts, groups, strict=True)]


def _joined(texts: Sequence[tuple[str, str]]) -> list[int]:
    """Numbers pairs so that those that share a text get the same number."""
    first: dict[str, int] = {}
    root = list(range(len(texts)))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    for i, both in enumerate(texts):
        for text in both:
            root[find(i)] = find(first.setdefault(text, i))
    return [find(i) for i in range(len(texts))]


def of_labels(data: classification.Data) -> list[Pair]:
    """Pairs each sentence with the next of its label; the label is the group.

    Each sentence is in one pair only, so that none is looked up among positives that
    include it; the last of an odd number is left out.

    Raises:
      ValueError: the labels are numbers.
    """
    if not data.labels:
        raise ValueError("numbers do not make groups: give a set with labels")
    waiting: dict[int, str] = {}
    made = []
    for row in data.rows:
        label = int(row.label)
        if label in waiting:
            made.append(Pair(waiting.pop(label), row.first, label))
        else:
            waiting[label] = row.first
    return made


def encode(
    tokenizer: tokenization.Tokenizer, pairs: Sequence[Pair], max_length: int
) -> Encoded:
    """Returns examples of pairs; long texts are truncated but keep the last token."""
    made: list[Example] = []
    truncated = 0
    for pair in pairs:
        own = {"group": np.asarray(pair.group, np.int32)}
        for name, text in (("anchor", pair.anchor), ("positive", pair.positive)):
            ids = tokenizer.encode_classified(text, None)
            if len(ids) > max_length:
                truncated += 1
                ids = [*ids[: max_length - 1], ids[-1]]
            own[name] = np.asarray(ids, np.int32)
        own["tokens"] = max(own["anchor"], own["positive"], key=len)
        made.append(own)
    return Encoded(made, truncated)


def collate(example: Example, length: int, pad_id: int) -> batches.Batch:
    """Returns a row: both texts `[2, length]`, which tokens are real, and the group."""
    texts = [example[name] for name in COLUMNS]
    pad = lambda ids: np.pad(ids, (0, length - len(ids)), constant_values=pad_id)
    return {
        "tokens": np.stack([pad(ids) for ids in texts]),
        "real": np.stack([np.arange(length) < len(ids) for ids in texts]),
        "groups": example["group"],
        "weights": np.ones((), np.float32),
    }
