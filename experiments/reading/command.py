"""How every command starts: a mistake in its flags or config ends in one sentence.

    if __name__ == "__main__":
        command.run(main)

A mistake in what was typed ends the process with exit code 1 and no traceback; an error
in the code of a config file, or in lorax itself, keeps its traceback.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import pathlib
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

import lorax_cli
from experiments.machine import record

CONFIG = "A config file, or the name of one that comes with lorax; see lorax --help."
"""The help of `--config`."""
_OF_ABSL = re.compile(r"^<[^>]*>: |;\s+repeat this option to specify a list of values")
"""What absl adds to a flag's help text."""


def run(main: Callable[[Sequence[str]], Any]) -> None:
    """Parses the flags and runs `main(argv)`, as `absl.app.run` does."""
    app.run(main, flags_parser=_parse)


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Turns an error about what was typed into one sentence and an exit."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"{_name()}: {error}")


def _parse(argv: list[str]) -> list[str]:
    """Parses flags; where they are wrong, exits with one sentence."""
    if {"--help", "-h", "-help"} & set(argv):
        print(_help())
        sys.exit()
    try:
        left = flags.FLAGS(_with_configs(argv))
        if not flags.FLAGS["verbosity"].present:  # at INFO libraries log what they lack
            logging.set_verbosity(logging.WARNING)
        _require_file()
        return left
    except flags.Error as error:
        sys.exit(f"{_name()}: {_of_a_flag(str(error))}")
    except (AttributeError, KeyError) as error:  # an override of an unknown field
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


def _help() -> str:
    """Returns the program's docstring, and a line or two for each of its flags."""
    lines = [(sys.modules["__main__"].__doc__ or "").strip(), ""]
    for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0]):
        choices = getattr(flag.parser, "enum_values", None)
        default = str(flag.default_as_str).strip("'") if flag.default else ""
        value = "|".join(choices) if choices else default
        name = f"  --{flag.name}{'=' if value else ''}{value}"
        told = _OF_ABSL.sub("", flag.help or "")
        lines += textwrap.wrap(f"{name:<22} {told}", 88, subsequent_indent=" " * 23)
    return "\n".join(lines)


def _with_configs(argv: Sequence[str]) -> list[str]:
    """Replaces the names of lorax's own configs in the arguments by their files."""
    found = []
    for before, given in zip(["", *argv], argv, strict=False):
        flag, equals, value = given.partition("=")
        if flag in ("--config", "-config") and equals:
            found.append(f"{flag}={find_config(value)}")
        else:
            is_value = before in ("--config", "-config")
            found.append(find_config(given) if is_value else given)
    return found


def find_config(given: str) -> str:
    """Returns the file of a config, and its argument if it has one.

    Args:
      given: a file, or the name of one of lorax's configs, `configs/quickstart.py` or
        `quickstart`; an argument may follow, as in `quickstart:runlocal`. Anything
        else is returned unchanged.
    """
    name, colon, argument = given.partition(":")
    own = (lorax_cli.ROOT / name, lorax_cli.CONFIGS / f"{name}.py")
    places = (pathlib.Path(name), *own)
    found = next((place for place in places if place.is_file()), name)
    return f"{found}{colon}{argument}"


def _of_a_flag(text: str) -> str:
    """Reduces an absl error to its sentence; one from a config's code stays whole."""
    if missing := re.search(r"Flag (--\w+) must have a value", text):
        return f"give {missing[1]}, see {_name()} --help"
    *before, last = text.strip().splitlines()
    if before and "in parse_arg" in text:
        return f"--config: {last.partition(': ')[2]}"
    return text


def _require_file() -> None:
    """Exits, naming similar configs, if the config file does not exist."""
    if "config" not in flags.FLAGS or not flags.FLAGS["config"].present:
        return
    given = config_flags.get_config_filename(flags.FLAGS["config"])
    path = pathlib.Path(given.partition(":")[0])
    if path.exists():
        return
    beside = sorted(str(file) for file in path.parent.glob("*.py") if path.suffix)
    known = [*beside, *lorax_cli.configs()]
    near = difflib.get_close_matches(str(path), known, n=3, cutoff=0.5)
    sys.exit(
        f"{_name()}: the config {path} does not exist. Give a file, or the name of one "
        f"of lorax's configs: {', '.join(near or known)}"
    )


def _name() -> str:
    """Returns the program's name, with which errors begin."""
    return record.program().removeprefix("python -m ")
