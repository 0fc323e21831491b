"""Fixed-length windows of bytes, for training and for evaluation.

A batch is a dict of `inputs` and `targets` (int32 `[batch, time]`, targets one byte
ahead) and `weights` (float32 `[batch, time]`, 0 on padding).
"""

from collections.abc import Sequence

import grain
import numpy as np

from experiments.data.sources import documents

VOCABULARY = 256  # every byte is a token
SEPARATOR = b"\0"  # opens every document; occurs in none of them

Batch = dict[str, np.ndarray]


def stream(docs: Sequence[documents.Document]) -> np.ndarray:
    """Joins documents into one array of bytes, with a separator before each.

    Returns:
      uint8 `[bytes]`.
    """
    return np.frombuffer(b"".join(SEPARATOR + d.text for d in docs), np.uint8)


def training_batches(
    docs: Sequence[documents.Document], batch_size: int, length: int, seed: int
) -> grain.MapDataset:
    """Returns an endless dataset of random windows, indexed by step.

    Every epoch visits each stretch of `length` bytes once, in a fresh order and from a
    fresh offset, so that small texts are not cut at the same bytes each time. The order
    is a function of `(seed, step)`, so resuming needs no other state.
    """
    text = stream(docs)
    starts = len(text) // length - 1
    if starts < 1:
        raise ValueError(
            f"{len(text)} bytes of text are too few for windows of {length}: reduce "
            "`data.length` or give more text."
        )

    def window(start: int, rng: np.random.Generator) -> Batch:
        begin = start * length + int(rng.integers(length))
        return _example(text[begin : begin + length + 1])

    return (
        grain.MapDataset.range(starts)
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(window)
        .batch(batch_size)
    )


def evaluation_batches(
    docs: Sequence[documents.Document],
    batch_size: int,
    length: int,
    limit: int | None = None,
) -> list[Batch]:
    """Returns the documents' bytes in consecutive windows, each byte scored once.

    Each window is scored from a cold start (its first target sees only one byte before
    it), which is slightly pessimistic, and equally so for every model compared.

    Args:
      docs: held-out documents.
      batch_size: windows per batch; padding windows of weight 0 fill the last one.
      length: bytes per window.
      limit: score about this many bytes, in windows spread evenly over the text; None
        scores all.
    """
    text = stream(docs)
    scored = len(text) - 1
    windows = -(-scored // length)
    chosen = np.arange(windows)
    if limit is not None and limit < scored:
        chosen = np.linspace(0, windows - 1, max(1, limit // length)).astype(int)
    at = chosen[:, None] * length + np.arange(length)  # [windows, time]
    at = np.concatenate([at, np.full((-len(at) % batch_size, length), scored)])
    padded = np.append(text, np.zeros(1, np.uint8)).astype(np.int32)
    rows = {
        "inputs": padded[np.minimum(at, scored)],
        "targets": padded[np.minimum(at + 1, scored + 1)],
        "weights": (at < scored).astype(np.float32),
    }
    batches = range(0, len(at), batch_size)
    return [{k: v[i : i + batch_size] for k, v in rows.items()} for i in batches]


def _example(window: np.ndarray) -> Batch:
    """Turns `[length + 1]` bytes into a row of a batch."""
    window = window.astype(np.int32)
    weights = np.ones(len(window) - 1, np.float32)
    return {"inputs": window[:-1], "targets": window[1:], "weights": weights}
