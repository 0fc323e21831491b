"""Rows of CSV, TSV, JSON lines and text files; what is malformed is named and counted.

A path may end in `.gz`, or lead through a zip archive as if that were a folder:
`e2e-dataset.zip/e2e-dataset/devset.csv`. The kind of a file follows from its ending.
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

csv.field_size_limit(2**24)  # one document a field; the default is 128 KiB


class Row(NamedTuple):
    """One good row and where it stood."""

    where: str  # "file:line", the line that the row begins on
    values: dict[str, Any]  # column -> str; for JSON lines, any JSON value


class Records(NamedTuple):
    """A file's good rows, and what was wrong with the others."""

    path: str
    rows: tuple[Row, ...]
    malformed: tuple[str, ...] = ()  # "file:line: reason", one a row


class MalformedRow(ValueError):
    """A row that cannot be used; `records.convert` counts it and goes on."""


def read(
    path: str | os.PathLike[str],
    *,
    columns: Sequence[str] = (),
    header: Sequence[str] | None = None,
    encoding: str = "utf-8",
    use: Callable[[Row], Row] | None = None,
) -> Records:
    """Reads a file of rows by its ending: `.csv`, `.tsv`, `.jsonl` or `.json`.

    `.json` is a list of objects. In a `.tsv`, quotes are letters, as in GLUE. And
    "hf:NAME:SPLIT" is a Hugging Face dataset, see `hub.rows`.

    Args:
      path: the file, perhaps with `.gz` after its ending or inside a zip archive.
      columns: what every row must have.
      header: the columns' names, of a CSV or TSV whose first line is no header.
      encoding: of the file; lines that are not valid in it are malformed rows.
      use: see `convert`; applied to rows that have all columns.

    Returns:
      The good rows. If there are malformed ones too, a warning names the first.

    Raises:
      ValueError: for another ending, or if no row is good.
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
    """Applies a conversion to each row, setting aside the rows that it refuses.

    Args:
      path: for messages.
      found: rows, and "file:line: reason" of rows that are malformed already.
      use: returns the row as it shall be, or raises `MalformedRow`.

    Raises:
      ValueError: if no row is left.
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
    """The file's lines that are not blank, as rows with the one column "text".

    Lines end at line feeds alone: the separators that `str.splitlines` adds occur
    inside real text. Undecodable lines come as "file:line: reason".
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
    """The elements of one JSON list, as rows with the one column named.

    Raises:
      ValueError: if it is no JSON list.
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
    """The whole file as text.

    Raises:
      ValueError: if it is not valid in the encoding; names the line.
    """
    data = read_bytes(path)
    try:
        return data.decode(encoding).removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise ValueError(f"{path}:{line}: {_not_valid(e)}") from e


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The content of a file: plain, `.gz`, or a member of a zip archive.

    Raises:
      FileNotFoundError: if there is none; for an archive, lists its members.
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
            raise ValueError(f"{path} is no intact gzip file: {e}") from e
    return data


def _not_valid(error: UnicodeDecodeError) -> str:
    """The reason in a few words."""
    byte = error.object[error.start]
    return f"byte 0x{byte:02x} is not valid {error.encoding}; is it another encoding?"


def _tabular(
    path: str | os.PathLike[str],
    delimiter: str,
    header: Sequence[str] | None,
    encoding: str,
) -> Iterator[Row | str]:
    """Rows of a CSV (quoted fields may span lines) or TSV (quotes are letters)."""
    bad: list[str] = []

    def lines() -> Iterator[str]:
        for number, line in enumerate(io.BytesIO(read_bytes(path)), 1):
            try:
                yield line.decode(encoding).removeprefix("\ufeff")
            except UnicodeDecodeError as e:
                bad.append(f"{path}:{number}: {_not_valid(e)}")
                yield "\n"  # an empty row, which is skipped: line numbers stay true

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
    """ValueError naming a column that stands in a header twice.

    A column without a name may: nothing can ask for it.
    """
    for name in filter(None, names):
        places = [i for i, other in enumerate(names, 1) if other == name]
        if len(places) > 1:
            raise ValueError(
                f"{where}: the column {name!r} stands {len(places)} times in the "
                f"header, at {', '.join(map(str, places))} of {len(names)}: rename or "
                "remove all but the one that is meant"
            )


def _json(
    path: str | os.PathLike[str], kind: str, encoding: str
) -> Iterator[Row | str]:
    """Rows of JSON lines, or of one JSON list."""
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
    """A row, or what is wrong with it."""
    if isinstance(value, dict):
        return Row(where, value)
    return f"{where}: expected an object, got {type(value).__name__}"


def _key_of_constant(text: str) -> str:
    """Names the key under which NaN or an infinity stands, if that is what is wrong."""
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
    """An object of JSON, whose parser would take the last of two equal keys."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands more than once in an object")
    return found


def _no_constant(name: str) -> Any:
    """NaN and the infinities are no JSON, and no label or text either."""
    raise ValueError(f"{name} is no JSON value")
