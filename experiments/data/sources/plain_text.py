"""Language modelling on plain text: from documents to fixed windows of tokens.

Documents are joined, each with BOS before and EOS after it if the tokenizer has them,
and cut into windows of `length` predictions. The last token of a window is the first of
the next, so that every token of the stream but the first is predicted exactly once.
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
      separator: what separates the documents of a plain text, such as "<|book|>"; None
        if it is one document.
      column: of a table.

    Raises:
      ValueError: there is no text.
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
    """Returns examples of `length + 1` tokens; the last may be shorter.

    The `bytes` of all windows sum to the UTF-8 bytes of the texts: a document's bytes
    are shared equally among its tokens.

    Args:
      tokenizer: of the model.
      texts: documents.
      length: predictions per window.
      source: names the data in errors.

    Raises:
      ValueError: there are fewer than two tokens.
    """
    if length < 1:
        raise ValueError(f"length={length}: a window has at least one prediction.")
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
            f"{source}: {len(streams)} tokens of text leave nothing to predict."
        )
    tokens = np.asarray(streams, np.int32)
    return _cut(tokens, np.cumsum(sizes), length)


def repair_mojibake(text: str) -> str:
    """Repairs UTF-8 that was once decoded as Windows-1252.

    Runs of characters that cannot have arisen that way are left alone.

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
    """Returns character -> the byte above 127 that Windows-1252 decodes to it."""
    table = {}
    for byte in range(128, 256):
        try:
            table[bytes([byte]).decode("cp1252")] = byte
        except UnicodeDecodeError:  # five bytes have no character: kept as they are
            table[chr(byte)] = byte
    return table


_WRONGLY_READ = _wrongly_read()


def _utf8(run: bytearray) -> str:
    """Decodes the bytes as UTF-8 or, if invalid, as they were read."""
    try:
        # Windows-1252 has no character for the last byte of a closing quote, E2 80 9D,
        # and much software drops it
        return re.sub(rb"\xe2\x80(?![\x80-\xbf])", b"\xe2\x80\x9d", run).decode()
    except UnicodeDecodeError:
        back = {byte: character for character, byte in _WRONGLY_READ.items()}
        return "".join(back[byte] for byte in run)


def _text(row: records.Row, column: str) -> records.Row:
    """Returns a row with text in its column."""
    if not isinstance(row.values[column], str) or not row.values[column].strip():
        raise records.MalformedRow(f"{column!r} is {row.values[column]!r}, not text")
    return row


def _cut(tokens: np.ndarray, sizes: np.ndarray, length: int) -> list[Example]:
    """Cuts a stream into windows; `sizes` is the running sum of bytes per token."""
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
    """Returns pairs of neighbouring edges."""
    return zip(edges[:-1], edges[1:], strict=True)
