"""Files of a run on a disk that may fail: full, read-only, gone.

Errors name the path, files are replaced atomically, and a JSON line that was cut short
by a full disk or a kill is dropped with a warning.
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
    """Names the path in an OSError, which a failed `write` or `flush` does not."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path} could not be written: {error.strerror or error}. Make room there, "
            "or make it writable, and run the same command again",
        ) from error


def replace(path: str | os.PathLike[str], text: str) -> None:
    """Writes a whole file; after an error, the previous one is still there.

    Raises:
      OSError: it cannot be written; names the path.
    """
    path = pathlib.Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # one per process
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
    """Appends a JSON line, on a new line even if the last one was cut short.

    Raises:
      OSError: it cannot be written; names the path.
    """
    with failing(path), open(path, "a+b") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        torn = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * torn + json.dumps(value).encode() + b"\n")


def read_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    r"""Reads JSON lines; those that a failed write cut short are logged and dropped.

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
