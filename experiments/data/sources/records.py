"""Rows of CSV, TSV, JSON lines and text files; malformed rows are named and counted.

A path may end in `.gz`, or go through a zip archive as if that were a folder:
`e2e-dataset.zip/e2e-dataset/devset.csv`. The extension tells the kind of a file.
"""

import csv
import gzip
import io
import itertools
import json
import os
import pathlib
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from experiments.data.sources import hub

# How many malformed rows a warning or an error lists in full.
LISTED = 5

csv.field_size_limit(2**24)  # a field may be a document; the default is 128 KiB


class Row(NamedTuple):
    """One good row and where it came from."""

    where: str  # "file:line", the line on which the row begins
    values: dict[str, Any]  # column -> str; for JSON lines, any JSON value


class Records(NamedTuple):
    """A file's good rows, and what was wrong with the others."""

    path: str
    rows: tuple[Row, ...]
    malformed: tuple[str, ...] = ()  # "file:line: reason" for each


class MalformedRow(ValueError):
    """A row cannot be used; `records.convert` counts it and goes on."""


def read(
    path: str | os.PathLike[str],
    *,
    columns: Sequence[str] = (),
    header: Sequence[str] | None = None,
    encoding: str = "utf-8",
    use: Callable[[Row], Row] | None = None,
) -> Records:
    """Reads a file of rows by its extension: `.csv`, `.tsv`, `.jsonl` or `.json`.

    `.json` is a list of objects. In a `.tsv`, quotes are ordinary characters, as in
    GLUE. "hf:NAME:SPLIT" is a Hugging Face dataset, see `hub.rows`.

    Args:
      path: the file, perhaps with `.gz` after its extension, or inside a zip archive.
      columns: the columns that every row must have.
      header: the column names of a CSV or TSV whose first line is not a header.
      encoding: of the file; lines that are not valid in it are malformed rows.
      use: see `convert`; applied to rows that have all columns.

    Returns:
      The good rows. If there are malformed ones too, a warning lists the first.

    Raises:
      ValueError: another extension, or no row is good.
    """
    kind = pathlib.Path(str(path).removesuffix(".gz")).suffix
    found: Iterable[Row | str]
    if str(path).startswith(hub.PREFIX):
        found = itertools.starmap(Row, hub.rows(str(path)))
    elif kind in (".csv", ".tsv"):
        found = _tabular(path, "\t" if kind == ".tsv" else ",", header, encoding)
    elif kind in (".jsonl", ".json"):
        found = _json(path, kind, encoding)
    else:
        raise ValueError(
            f"{path}: rows are read from .csv, .tsv, .jsonl and .json (with or without "
            f".gz), not from {kind!r}."
        )

    def complete(row: Row) -> Row:
        lacking = [name for name in columns if row.values.get(name) is None]
        if lacking:
            raise MalformedRow(
                f"no {', '.join(map(repr, lacking))} among {sorted(row.values)}"
            )
        return row if use is None else use(row)

    return convert(path, found, complete)


def convert(
    path: str | os.PathLike[str],
    found: Iterable[Row | str],
    use: Callable[[Row], Row],
) -> Records:
    """Applies a conversion to each row, and sets aside the rows that it refuses.

    Args:
      path: for messages.
      found: rows, and "file:line: reason" for rows already known to be malformed.
      use: returns the converted row, or raises `MalformedRow`.

    Raises:
      ValueError: no row is left.
    """
    rows, malformed = [], []
    for row in found:
        if isinstance(row, str):
            malformed.append(row)
            continue
        try:
            rows.append(use(row))
        except MalformedRow as e:
            malformed.append(f"{row.where}: {e}")
    listed = "\n  ".join(malformed[:LISTED] + ["..."] * (len(malformed) > LISTED))
    if not rows:
        raise ValueError(
            f"{path}: no usable row"
            + (f"; {len(malformed)} malformed:\n  {listed}" if malformed else ".")
        )
    if malformed:
        warnings.warn(
            f"{path}: dropped {len(malformed)} malformed of "
            f"{len(rows) + len(malformed)} rows:\n  {listed}",
            stacklevel=3,
        )
    return Records(str(path), tuple(rows), tuple(malformed))


def read_lines(
    path: str | os.PathLike[str], encoding: str = "utf-8"
) -> list[Row | str]:
    """Returns the file's non-blank lines, as rows with the single column "text".

    Lines end only at line feeds: the other separators of `str.splitlines` occur inside
    real text. Undecodable lines come as "file:line: reason".
    """
    found: list[Row | str] = []
    for number, line in enumerate(read_bytes(path).split(b"\n"), 1):
        try:
            text = line.decode(encoding).removeprefix("\ufeff").removesuffix("\r")
        except UnicodeDecodeError as e:
            found.append(f"{path}:{number}: {_not_valid(e)}")
            continue
        if text.strip():
            found.append(Row(f"{path}:{number}", {"text": text}))
    return found


def read_list(
    path: str | os.PathLike[str], column: str, encoding: str = "utf-8"
) -> list[Row]:
    """Returns the elements of a JSON list, as rows with the single column `column`.

    Raises:
      ValueError: it is not a JSON list.
    """
    try:
        values = json.loads(
            read_text(path, encoding),
            parse_constant=_no_constant,
            object_pairs_hook=_once,
        )
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not JSON: {e}") from e
    if not isinstance(values, list):
        raise ValueError(f"{path}: expected a JSON list, got {type(values).__name__}")
    return [Row(f"{path}[{i}]", {column: value}) for i, value in enumerate(values)]


def read_text(path: str | os.PathLike[str], encoding: str = "utf-8") -> str:
    """Returns the whole file as text.

    Raises:
      ValueError: it is not valid in the encoding; names the line.
    """
    data = read_bytes(path)
    try:
        return data.decode(encoding).removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise ValueError(f"{path}:{line}: {_not_valid(e)}") from e


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Returns the content of a file: plain, `.gz`, or a member of a zip archive.

    Raises:
      FileNotFoundError: there is no such file; for an archive, lists its members.
    """
    path = pathlib.Path(path)
    archive = next(
        (p for p in path.parents if p.suffix == ".zip" and p.is_file()), None
    )
    if archive is None:
        data = path.read_bytes()
    else:
        member = path.relative_to(archive).as_posix()
        with zipfile.ZipFile(archive) as opened:
            if member not in opened.namelist():
                raise FileNotFoundError(
                    f"{archive} has no member {member!r}; it has {opened.namelist()}"
                )
            data = opened.read(member)
    if path.suffix == ".gz":
        try:
            return gzip.decompress(data)
        except (OSError, EOFError) as e:
            raise ValueError(f"{path} is not an intact gzip file: {e}") from e
    return data


def _not_valid(error: UnicodeDecodeError) -> str:
    """Returns the reason in a few words."""
    byte = error.object[error.start]
    return f"byte 0x{byte:02x} is not valid {error.encoding}; is it another encoding?"


def _tabular(
    path: str | os.PathLike[str],
    delimiter: str,
    header: Sequence[str] | None,
    encoding: str,
) -> Iterator[Row | str]:
    """Yields rows of a CSV (quoted fields may span lines) or a TSV (no quoting)."""
    bad: list[str] = []

    def lines() -> Iterator[str]:
        for number, line in enumerate(io.BytesIO(read_bytes(path)), 1):
            try:
                yield line.decode(encoding).removeprefix("\ufeff")
            except UnicodeDecodeError as e:
                bad.append(f"{path}:{number}: {_not_valid(e)}")
                yield "\n"  # an empty row, which is skipped: line numbers stay right

    reader = csv.reader(
        lines(),
        delimiter=delimiter,
        quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL,
        strict=True,
    )
    names = None if header is None else list(header)
    _require_once(str(path), names or ())
    while True:
        where = f"{path}:{reader.line_num + 1}"  # where the next row begins
        try:
            fields = next(reader, None)
        except csv.Error as e:
            bad.append(f"{where}: {e}, up to line {reader.line_num}")
            continue
        if fields is None:
            break
        if not fields:
            continue
        if names is None:
            names = fields
            _require_once(where, names)
        elif len(fields) != len(names):
            bad.append(f"{where}: {len(fields)} fields, but {len(names)} columns")
        else:
            yield Row(where, dict(zip(names, fields, strict=True)))
    yield from bad


def _require_once(where: str, names: Sequence[str]) -> None:
    """Raises ValueError if a column is in a header twice.

    Columns without a name may be: nothing can ask for them.
    """
    for name in filter(None, names):
        places = [i for i, other in enumerate(names, 1) if other == name]
        if len(places) > 1:
            raise ValueError(
                f"{where}: the column {name!r} is in the header {len(places)} times, "
                f"at {', '.join(map(str, places))} of {len(names)}: rename or remove "
                "all but the one that is meant"
            )


def _json(
    path: str | os.PathLike[str], kind: str, encoding: str
) -> Iterator[Row | str]:
    """Yields the rows of JSON lines, or of a JSON list."""
    if kind == ".json":
        for row in read_list(path, "", encoding):
            yield _object(row.where, row.values[""])
        return
    for line in read_lines(path, encoding):
        if isinstance(line, str):
            yield line
            continue
        try:
            value = json.loads(
                line.values["text"],
                parse_constant=_no_constant,
                object_pairs_hook=_once,
            )
        except (ValueError, RecursionError) as e:
            yield f"{line.where}: not JSON: {e}{_key_of_constant(line.values['text'])}"
            continue
        yield _object(line.where, value)


def _object(where: str, value: Any) -> Row | str:
    """Returns a row, or what is wrong with it."""
    if isinstance(value, dict):
        return Row(where, value)
    return f"{where}: expected an object, got {type(value).__name__}"


def _key_of_constant(text: str) -> str:
    """Names the key that holds NaN or an infinity, if that is what is wrong."""
    try:
        value = json.loads(text)
        for key in value if isinstance(value, dict) else ():
            try:
                json.dumps(value[key], allow_nan=False)
            except ValueError:
                return f" (under {key!r})"
    except (ValueError, RecursionError):
        pass
    return ""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a JSON object, refusing equal keys, of which Python would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is in an object more than once")
    return found


def _no_constant(name: str) -> Any:
    """Refuses NaN and the infinities, which are neither JSON nor a label or text."""
    raise ValueError(f"{name} is not a JSON value")
