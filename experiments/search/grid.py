"""A grid over the fields of a config, as text: `adapter.rank=2,8; adapter.init=pissa`.

All mistakes in it are found before anything runs: unknown fields, and values that are
not of their field's type.
"""

import ast
import difflib
from collections.abc import Iterable
from typing import Any

import ml_collections

from experiments.reading import fields

KINDS = (bool, int, float, str, tuple)
"""Types of the fields that a flag can set."""


def parse_grid(
    text: str, config: ml_collections.ConfigDict, overridden: Iterable[str] = ()
) -> dict[str, list[Any]]:
    """Reads `field=value,value; field=value`.

    Commas and semicolons inside brackets or quotes do not split. A value is read as a
    Python literal if possible, else as a string; a string field takes any text.

    Args:
      text: the grid.
      config: the config that has the fields.
      overridden: other fields that the command line sets.

    Returns:
      Field -> its values, in the order given.

    Raises:
      ValueError: an unknown field, a value that is not of the field's type, a field or
        value given twice, no values, or an unclosed bracket or quote.

    Example:
      >>> config = ml_collections.ConfigDict({"adapter": {"rank": 8, "init": "x"}})
      >>> parse_grid("adapter.rank=2,4; adapter.init=pissa", config)
      {'adapter.rank': [2, 4], 'adapter.init': ['pissa']}
    """
    grid: dict[str, list[Any]] = {}
    overridden = set(overridden)
    for axis in filter(None, map(str.strip, split(text, ";"))):
        name, equals, values = (part.strip() for part in axis.partition("="))
        if not equals or not values:
            raise ValueError(f"--grid: {axis!r} has no values; write field=value,value")
        kind = kind_of(name, config)
        if name in grid or name in overridden:
            twice = "--grid" if name in grid else f"--config.{name}"
            raise ValueError(f"--grid: {name} is given here and by {twice}; keep one")
        grid[name] = []
        for value in map(str.strip, split(values, ",")):
            read = read_value(name, value, kind)
            if read in grid[name]:
                raise ValueError(f"--grid: {name} has the value {value} twice")
            grid[name].append(read)
    if not grid:
        raise ValueError("--grid is empty; write field=value,value; field=value")
    return grid


def split(text: str, separator: str) -> list[str]:
    """Splits at separators outside brackets and quotes."""
    parts, closing, quote = [""], [], ""
    pairs = {"(": ")", "[": "]", "{": "}"}
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in pairs:
            closing.append(pairs[letter])
        elif closing and letter == closing[-1]:
            closing.pop()
        elif letter == separator and not closing:
            parts.append("")
            continue
        parts[-1] += letter
    if quote or closing:
        raise ValueError(f"--grid: {text!r} lacks a closing {quote or closing[-1]}")
    return parts


def kind_of(name: str, config: ml_collections.ConfigDict) -> type:
    """Returns the type of a field; ValueError if it is unknown or cannot be swept."""
    known = [field for field, _ in fields.leaves(config)]
    if name.startswith("population."):
        raise ValueError(
            f"--grid: {name}: a sweep makes its populations itself; give a field of "
            "the run, such as adapter.rank"
        )
    if inside := [field for field in known if field.startswith(f"{name}.")]:
        raise ValueError(f"--grid: {name} is a section; it has {', '.join(inside)}")
    if name not in known:
        last = name.rpartition(".")[2]
        near = [field for field in known if field.rpartition(".")[2] == last]
        near += difflib.get_close_matches(name, known, n=4, cutoff=0.5)
        told = ", ".join(dict.fromkeys(near)) or f"sections {', '.join(config)}"
        raise ValueError(f"--grid: the config has no field {name}; try {told}")
    holder, _, last = name.rpartition(".")
    kind = at(config, holder).get_type(last)
    if kind not in KINDS:
        raise ValueError(
            f"--grid: {name} is of type {kind.__name__}, which no flag can set"
        )
    return kind


def read_value(name: str, text: str, kind: type) -> Any:
    """Reads a value as its field's type; ValueError if it is of another type."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if kind is str:
        return value if isinstance(value, str) else text
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        like = ", such as ('a', 'b') or (1,)" if kind is tuple else ""
        raise ValueError(
            f"--grid: {name}={text}: the field holds {kind.__name__}{like}; this is "
            f"{type(value).__name__}"
        )
    return value


def at(config: ml_collections.ConfigDict, path: str) -> Any:
    """Returns what is at a dotted path; "" is the config itself."""
    for name in filter(None, path.split(".")):
        config = config[name]
    return config
