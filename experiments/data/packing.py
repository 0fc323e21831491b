"""Packing: several examples in one row, so that little of it is padding.

Packed batches are for models that take segments: examples do not see each other and
positions restart, so packing does not change any example's loss. A batch holds:

    inputs:    int32 [batch, length]
    targets:   int32 [batch, length]
    weights:   float32 [batch, length]  0 on padding
    segments:  int32 [batch, length]    1, 2, .. in a row; 0 on padding
    positions: int32 [batch, length]    from 0 in every segment
    bytes:     int32 [batch]            of all its examples
    index:     int32 [batch, length]    position of the token's example; -1 on padding

grain's own packers pack what one process reads. Here the rows are one sequence, made
only from lengths and a seed, of which every process reads its part. The number of
processes may therefore change between steps, and no example is lost or repeated.
"""

import functools
from collections.abc import Sequence

import grain
import numpy as np

from experiments.data import batches
from experiments.data.examples import Example

OPEN = 64  # rows that are still being filled
ENDLESS = 2**40


def packed_batches(
    examples: Sequence[Example],
    batch_size: int,
    length: int,
    pad_id: int,
    seed: int,
    part: slice = batches.WHOLE,
) -> grain.MapDataset:
    """Returns an endless dataset of packed batches, indexed by step.

    Every epoch packs all examples once, in a fresh order: each goes to the first open
    row that has room. Rows are numbered through all epochs, so starting at a late step
    recomputes the plans of earlier epochs, from lengths only; nothing else is replayed.

    Args:
      examples: as made by `experiments.data.examples` or `plain_text`.
      batch_size: rows.
      length: of a row, in tokens; it must hold every example.
      pad_id: fills rows; see `tokenization.padding_id`.
      seed: of the order.
      part: the rows of every batch that are made here; see `training_batches`.

    Raises:
      ValueError: an example does not fit, or there are none.
    """
    sizes = np.array([batches.positions(example) for example in examples])
    if not len(sizes) or sizes.max() > length:
        worst = int(sizes.argmax()) if len(sizes) else None
        raise ValueError(
            f"{len(sizes)} examples for rows of {length} tokens"
            + (f"; examples[{worst}] takes {sizes[worst]}" if len(sizes) else "")
            + ": truncate them (`examples.truncate`), or use longer rows."
        )
    rows = Rows(sizes, length, seed)

    def make(i: int) -> batches.Batch:
        return _row([(j, examples[j]) for j in rows[i]], length, pad_id)

    return (
        grain.MapDataset.range(ENDLESS)
        .batch(batch_size)
        .map(lambda numbers: batches.stack(make(int(i)) for i in numbers[part]))
    )


class Rows:
    """Which examples each row holds, with rows numbered through all epochs."""

    def __init__(self, sizes: np.ndarray, length: int, seed: int) -> None:
        """Plans the first epoch.

        Args:
          sizes: int `[examples]`, tokens.
          length: of a row.
          seed: of the orders.
        """
        self._sizes, self._length, self._seed = sizes, length, seed
        self._plan = functools.lru_cache(2)(self._planned)
        self._ends = [len(self._plan(0))]  # number of rows up to the end of each epoch

    def __getitem__(self, number: int) -> list[int]:
        """Returns the examples of a row."""
        while self._ends[-1] <= number:
            self._ends.append(self._ends[-1] + len(self._plan(len(self._ends))))
        epoch = int(np.searchsorted(self._ends, number, side="right"))
        return self._plan(epoch)[number - (self._ends[epoch - 1] if epoch else 0)]

    def _planned(self, epoch: int) -> list[list[int]]:
        """Packs by first fit; where none fits, a new row replaces the fullest."""
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._sizes))
        room = np.zeros(OPEN, int)
        held: list[list[int]] = [[] for _ in range(OPEN)]
        closed = []
        for example in order.tolist():
            size = self._sizes[example]
            fits = np.flatnonzero(room >= size)
            at = int(fits[0]) if len(fits) else int(room.argmin())
            if not len(fits):
                closed += [held[at]] if held[at] else []
                room[at], held[at] = self._length, []
            room[at] -= size
            held[at].append(example)
        return closed + [row for row in held if row]


def _row(
    members: Sequence[tuple[int, Example]], length: int, pad_id: int
) -> batches.Batch:
    """Returns one row, with its examples one after the other."""
    made = {
        "inputs": np.full(length, pad_id, np.int32),
        "targets": np.full(length, pad_id, np.int32),
        "weights": np.zeros(length, np.float32),
        "segments": np.zeros(length, np.int32),
        "positions": np.zeros(length, np.int32),
        "index": np.full(length, -1, np.int32),
    }
    begin = 0
    for segment, (place, example) in enumerate(members, 1):
        tokens, mask = example["tokens"], example["loss_mask"]
        own = slice(begin, begin + len(tokens) - 1)
        made["inputs"][own], made["targets"][own] = tokens[:-1], tokens[1:]
        made["weights"][own] = mask[1:]
        made["segments"][own], made["index"][own] = segment, place
        made["positions"][own] = np.arange(len(tokens) - 1)
        begin = own.stop
    total = sum(int(example["bytes"]) for _, example in members)
    return made | {"bytes": np.asarray(total, np.int32)}
