"""Turns examples into batches of a few static shapes.

Each batch length costs one compilation, so examples are sorted into buckets by the
shortest length that holds them, and padded to it.

Language modelling (`next_token`), with tokens t_0 .. t_n and their loss mask:

    inputs:  int32 [batch, length]    t_0 .. t_{n-1}
    targets: int32 [batch, length]    t_1 .. t_n
    weights: float32 [batch, length]  the mask of the targets; 0 on padding
    bytes:   int32 [batch]            UTF-8 bytes of the text trained on
    index:   int32 [batch]            position of the example in its list; -1: filler

Classification (`labelled`):

    tokens:  int32 [batch, length]
    real:    bool [batch, length]     False on padding
    labels:  int32 or float32 [batch]
    weights: float32 [batch]          0 on rows that only fill the last batch
    index:   int32 [batch]

Images (`pictured`): as classification, but instead of tokens and real

    pixels:  float32 [batch, height, width, channels]

Padding is recognised only by its weight, so any id may be used for it.
"""

import bisect
from collections.abc import Callable, Iterable, Sequence

import grain
import numpy as np

from experiments.data.examples import Example

Batch = dict[str, np.ndarray]
WHOLE = slice(None)
# one example, the length to pad it to, the padding id -> a row of a batch
Collate = Callable[[Example, int, int], Batch]


def next_token(example: Example, length: int, pad_id: int) -> Batch:
    """Returns a row that predicts each token from those before it, on every side."""
    tokens, mask = example["tokens"], example["loss_mask"]
    return {
        "inputs": _padded(tokens[..., :-1], length, pad_id),
        "targets": _padded(tokens[..., 1:], length, pad_id),
        "weights": _padded(mask[..., 1:], length, 0),
        "bytes": example["bytes"],
    }


def labelled(example: Example, length: int, pad_id: int) -> Batch:
    """Returns a row with one label."""
    tokens = example["tokens"]
    return {
        "tokens": _padded(tokens, length, pad_id),
        "real": np.arange(length) < len(tokens),
        "labels": example["label"],
        "weights": np.ones((), np.float32),
    }


def pictured(example: Example, length: int, pad_id: int) -> Batch:
    """Returns an image with one label; all have the same size, whatever the length."""
    del length, pad_id
    return {
        "pixels": example["pixels"],
        "labels": example["label"],
        "weights": np.ones((), np.float32),
    }


def positions(example: Example) -> int:
    """Returns how many positions an example takes: its last token may only be a target.

    Images all have the same size, so buckets do not apply to them: 0.
    """
    if "pixels" in example:
        return 0
    return example["tokens"].shape[-1] - ("loss_mask" in example)


def training_batches(
    examples: Sequence[Example],
    batch_size: int,
    lengths: Sequence[int],
    pad_id: int,
    seed: int,
    collate: Collate = next_token,
    part: slice = WHOLE,
) -> grain.MapDataset:
    """Returns an endless dataset of batches, indexed by step.

    A batch comes from one bucket, and buckets take turns in proportion to their number
    of examples. Every bucket goes through its examples in a fresh order each epoch.
    Everything is a function of `(seed, step)`, whatever the number of processes, so
    resuming needs no other state, and may use more or fewer processes.

    Args:
      examples: as made by `experiments.data.examples` or `classification`.
      batch_size: rows.
      lengths: of the buckets, in any order; the longest must hold every example.
      pad_id: fills rows; see `tokenization.padding_id`.
      seed: of the order.
      collate: `next_token`, `labelled` or `pictured`.
      part: the rows of every batch that are made here, if several processes make one
        batch together.

    Raises:
      ValueError: `examples` is empty, or one is longer than the longest length.
    """
    kept = [bucket for bucket in _buckets(examples, lengths) if bucket[1]]
    parts = []
    for length, members in kept:
        ids = grain.MapDataset.source(members).seed(seed).shuffle().repeat()
        row = _row(examples, length, pad_id, collate)
        parts.append(
            ids.batch(batch_size).map(lambda ids, row=row: stack(map(row, ids[part])))
        )
    if len(parts) == 1:
        return parts[0]
    return grain.MapDataset.mix(parts, [len(members) for _, members in kept])


def evaluation_batches(
    examples: Sequence[Example],
    batch_size: int,
    lengths: Sequence[int],
    pad_id: int,
    collate: Collate = next_token,
    part: slice = WHOLE,
) -> list[Batch]:
    """Returns batches in which every example counts once.

    The last batch of a bucket is filled up with rows of weight 0, so that all processes
    make the same number of batches.

    Args:
      examples: see `training_batches`, as for the other arguments.
      batch_size: rows.
      lengths: of the buckets.
      pad_id: fills rows.
      collate: `next_token`, `labelled` or `pictured`.
      part: see `training_batches`.
    """
    made = []
    for length, members in _buckets(examples, lengths):
        row = _row(examples, length, pad_id, collate)
        for begin in range(0, len(members), batch_size):
            ids = members[begin : begin + batch_size]
            short = batch_size - len(ids)
            rows = [*map(row, ids[part])]
            wanted = len(range(batch_size)[part])
            rows += [_filler(row(ids[0]))] * (wanted - len(rows)) if short else []
            made.append(stack(rows))
    return made


def stack(rows: Iterable[Batch]) -> Batch:
    """Stacks rows into a batch."""
    rows = [*rows]
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def _buckets(
    examples: Sequence[Example], lengths: Sequence[int]
) -> list[tuple[int, list[int]]]:
    """Returns (length, indices of the examples padded to it), shortest first."""
    if not examples or not lengths:
        raise ValueError(
            f"{len(examples)} examples and lengths {list(lengths)}: give one or more "
            "of each."
        )
    lengths = sorted(set(lengths))
    members: list[list[int]] = [[] for _ in lengths]
    for i, example in enumerate(examples):
        bucket = bisect.bisect_left(lengths, positions(example))
        if bucket == len(lengths):
            raise ValueError(
                f"examples[{i}] takes {positions(example)} positions, but the longest "
                f"batches have {lengths[-1]}: truncate it (`examples.truncate`) or add "
                "a length."
            )
        members[bucket].append(i)
    return list(zip(lengths, members, strict=True))


def _row(
    examples: Sequence[Example], length: int, pad_id: int, collate: Collate
) -> Callable[[int], Batch]:
    """Returns a function from the index of an example to its padded row."""
    return lambda i: {
        **collate(examples[i], length, pad_id),
        "index": np.asarray(i, np.int32),
    }


def _filler(row: Batch) -> Batch:
    """Returns a copy of a row with weight 0; its tokens stay valid ids."""
    silent = {k: np.zeros_like(v) for k, v in row.items() if k in ("weights", "bytes")}
    return {**row, **silent, "index": np.asarray(-1, np.int32)}


def _padded(values: np.ndarray, length: int, fill: int) -> np.ndarray:
    """Pads `[..., n]` to `[..., length]`."""
    border = [(0, 0)] * (values.ndim - 1) + [(0, length - values.shape[-1])]
    return np.pad(values, border, constant_values=fill)
