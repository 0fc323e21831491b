"""How every command starts: what is wrong with its flags or config is one sentence.

    if __name__ == "__main__":
        command.run(main)

A mistake in what was typed ends the process with exit code 1 and no traceback; one in
the code of a config file, or in ours, keeps its own.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import pathlib
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import app, flags
from ml_collections import config_flags


def run(main: Callable[[Sequence[str]], Any]) -> None:
    """Parses the flags and runs `main(argv)`, as `absl.app.run` does."""
    app.run(main, flags_parser=_parse)


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Turns a ValueError about what was typed into one sentence and an exit."""
    try:
        yield
    except ValueError as error:
        sys.exit(f"{_name()}: {error}")


def _parse(argv: list[str]) -> list[str]:
    """Parses flags; what is wrong with them is one sentence."""
    try:
        left = flags.FLAGS(argv)
        _require_file()
        return left
    except flags.Error as error:
        sys.exit(f"{_name()}: {_of_a_flag(str(error))}")
    except (AttributeError, KeyError) as error:  # an override of no field
        if any(
            f.name == "get_config" for f in traceback.extract_tb(error.__traceback__)
        ):
            raise
        text = str(error)
        with contextlib.suppress(ValueError, SyntaxError):
            text = str(ast.literal_eval(text))
        name, _, hint = text.partition("\n")
        told = f". {hint}" if hint else ""
        sys.exit(f"{_name()}: the config has no field {name}{told}")


def _of_a_flag(text: str) -> str:
    """The sentence in an error of absl's; an error of a config's code stays whole."""
    *before, last = text.strip().splitlines()
    if before and "in parse_arg" in text:
        return f"--config: {last.partition(': ')[2]}"
    return text


def _require_file() -> None:
    """Ends the process, naming its neighbours, where the config file is not there."""
    if "config" not in flags.FLAGS or not flags.FLAGS["config"].present:
        return
    given = config_flags.get_config_filename(flags.FLAGS["config"])
    path = pathlib.Path(given.partition(":")[0])
    if path.exists():
        return
    known = sorted(file.name for file in path.parent.glob("*.py"))
    near = difflib.get_close_matches(path.name, known, n=3) or known
    sys.exit(
        f"{_name()}: there is no config file {path}; near it: "
        f"{', '.join(near) or 'none'}"
    )


def _name() -> str:
    """The command as it was typed: `experiments.main`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else pathlib.Path(sys.argv[0]).stem
