"""Language modelling on plain text: documents to fixed windows of tokens.

Documents are joined, each behind BOS and before EOS as far as the tokenizer has them,
and cut into windows of `length` predictions. A window's last token is the next one's
first, so that every token of the stream but the first is predicted exactly once.
"""

import os
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from experiments.data import tokenization
from experiments.data.examples import Example
from experiments.data.sources import records


class Documents(NamedTuple):
    """Texts in the order of the file."""

    texts: tuple[str, ...]
    malformed: tuple[str, ...] = ()


def read(
    path: str | os.PathLike[str], separator: str | None = None, column: str = "text"
) -> Documents:
    """Reads documents.

    Args:
      path: `.jsonl`, `.csv`, `.tsv` or "hf:.." with a column of texts; `.json`, a list
        of texts; any other file is plain text. All may end in `.gz`.
      separator: what stands between the documents of a plain text, such as
        "<|book|>"; None if it is one document.
      column: of a table.

    Raises:
      ValueError: if there is no text.
    """
    name = str(path).removesuffix(".gz")
    if name.startswith("hf:") or name.endswith((".jsonl", ".csv", ".tsv")):
        found = records.read(path, columns=[column], use=lambda r: _text(r, column))
    elif name.endswith(".json"):
        found = records.convert(
            path, records.read_list(path, column), lambda r: _text(r, column)
        )
    else:
        whole = records.read_text(path)
        texts = whole.split(separator) if separator else [whole]
        kept = tuple(text for text in texts if text.strip())
        if not kept:
            raise ValueError(f"{path}: no text.")
        return Documents(kept)
    return Documents(tuple(r.values[column] for r in found.rows), found.malformed)


def windows(
    tokenizer: tokenization.Tokenizer, texts: Iterable[str], length: int, source: str
) -> list[Example]:
    """Examples of `length + 1` tokens; the last may be shorter.

    The `bytes` of all windows sum to the UTF-8 bytes of the texts: each window's is
    the share of its document's bytes that its tokens are.

    Args:
      tokenizer: of the model.
      texts: documents.
      length: predictions a window.
      source: names the data in errors.

    Raises:
      ValueError: if there are fewer than two tokens.
    """
    if length < 1:
        raise ValueError(f"length={length}: a window has one prediction or more.")
    streams, sizes = [], []
    for text in texts:
        ids = [*tokenizer.encode(text)]
        opened = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        closed = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        size = len(text.encode()) / max(1, len(ids))
        streams += [*opened, *ids, *closed]
        sizes += [0.0] * len(opened) + [size] * len(ids) + [0.0] * len(closed)
    if len(streams) < 2:
        raise ValueError(
            f"{source}: {len(streams)} tokens of text, nothing to predict."
        )
    tokens = np.asarray(streams, np.int32)
    return _cut(tokens, np.cumsum(sizes), length)


def repair_mojibake(text: str) -> str:
    """UTF-8 that was once read as Windows-1252, read as what it was.

    Runs of characters that cannot have come about that way stay as they are.

    Example:
      >>> repair_mojibake("itâ€™s a cafÃ©, not a café")
      'it’s a café, not a café'
    """
    made, run = [], bytearray()
    for character in text + "\0":
        byte = _WRONGLY_READ.get(character)
        if byte is not None:
            run.append(byte)
            continue
        if run:
            made.append(_utf8(run))
            run = bytearray()
        made.append(character)
    return "".join(made)[:-1]


def _wrongly_read() -> dict[str, int]:
    """Character -> the byte above 127 that Windows-1252 reads as it."""
    table = {}
    for byte in range(128, 256):
        try:
            table[bytes([byte]).decode("cp1252")] = byte
        except UnicodeDecodeError:  # five bytes have no character: kept as they are
            table[chr(byte)] = byte
    return table


_WRONGLY_READ = _wrongly_read()


def _utf8(run: bytearray) -> str:
    """The bytes as UTF-8, or as they were read."""
    try:
        # Windows-1252 has no character for the last byte of a closing quote, E2 80 9D,
        # and much software drops it
        return re.sub(rb"\xe2\x80(?![\x80-\xbf])", b"\xe2\x80\x9d", run).decode()
    except UnicodeDecodeError:
        back = {byte: character for character, byte in _WRONGLY_READ.items()}
        return "".join(back[byte] for byte in run)


def _text(row: records.Row, column: str) -> records.Row:
    """A row with text in it."""
    if not isinstance(row.values[column], str) or not row.values[column].strip():
        raise records.MalformedRow(f"{column!r} is {row.values[column]!r}, no text")
    return row


def _cut(tokens: np.ndarray, sizes: np.ndarray, length: int) -> list[Example]:
    """Windows of a stream; `sizes` is the running sum of bytes up to each token."""
    made = []
    edges = [*range(0, len(tokens) - 1, length), len(tokens) - 1]
    # a first token that is text, not BOS, is never predicted: its bytes do not count
    counted = np.round(sizes[edges]).astype(np.int32)
    for i, (begin, end) in enumerate(_steps(edges)):
        window = tokens[begin : end + 1]
        mask = np.ones(len(window), np.float32)
        mask[0] = 0  # predicted by the window before, if at all
        made.append(
            {
                "tokens": window,
                "loss_mask": mask,
                "bytes": np.asarray(counted[i + 1] - counted[i], np.int32),
            }
        )
    return made


def _steps(edges: Sequence[int]) -> Iterable[tuple[int, int]]:
    """Neighbours."""
    return zip(edges[:-1], edges[1:], strict=True)
