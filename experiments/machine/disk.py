"""Files of a run on a disk that may fail: full, read-only, gone.

An error names the path, a file that is replaced is the old one or the new one, and of
JSON lines the one that a full disk or a kill has torn is dropped with a note.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from absl import logging


@contextlib.contextmanager
def failing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Names the path in an OSError, of which a failed `write` or `flush` has none."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path} could not be written: {error.strerror or error}. Make room there, "
            "or see that it may be written to, and start the same command once more",
        ) from error


def replace(path: str | os.PathLike[str], text: str) -> None:
    """Writes a whole file: after an error the one before is still there.

    Raises:
      OSError: it cannot be written; names the path.
    """
    path = pathlib.Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # its own: two may write
    with failing(path):
        try:
            with open(part, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise


def append(path: str | os.PathLike[str], value: Any) -> None:
    """Adds one JSON line; behind a torn one it begins a line of its own.

    Raises:
      OSError: it cannot be written; names the path.
    """
    with failing(path), open(path, "a+b") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        torn = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * torn + json.dumps(value).encode() + b"\n")


def read_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    r"""Reads JSON lines; one that a failing write cut short is logged and dropped.

    Example:
      >>> import tempfile
      >>> with tempfile.NamedTemporaryFile() as file:
      ...     _ = file.write(b'{"step": 1}\n{"step": 2, "lo')
      ...     file.flush()
      ...     read_lines(file.name)
      [{'step': 1}]
    """
    found = []
    data = pathlib.Path(path).read_bytes()
    for number, line in enumerate(data.split(b"\n"), 1):
        try:
            value = json.loads(line) if line else None
        except ValueError:  # not JSON, or bytes that are not text
            value = line
        if isinstance(value, dict):
            found.append(value)
        elif line:
            logging.warning(
                "%s:%d: dropped %r, a line cut short", path, number, line[:60]
            )
    return found
