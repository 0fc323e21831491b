"""Checks the type and range of values from files before anything computes with them.

A `Rule` says in words what a field must be and tests values; `check` raises an error
that names the field, its value and the rule. Python's `bool` is an `int`, and its JSON
parser reads NaN, so no rule takes a boolean for a number, nor NaN or infinity.
"""

from __future__ import annotations

import json
import math
import reprlib
import string
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

LARGEST = 2**31 - 1
"""The largest count, size or coefficient: the largest index of XLA."""

_HEX = frozenset(string.hexdigits.lower())
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


class Rule(NamedTuple):
    """What a field must be.

    Attributes:
      says: the rule in words that follow "it must be".
      fits: True for values that obey it.
    """

    says: str
    fits: Callable[[Any], bool]

    def __or__(self, other: Any) -> Rule:
        """Returns the rule "either"; `rule | None` accepts null as well."""
        if other is None:
            return Rule(f"{self.says}, or null", lambda v: v is None or self.fits(v))
        return Rule(
            f"{self.says}, or {other.says}", lambda v: self.fits(v) or other.fits(v)
        )


def check(where: str, value: Any, rule: Rule) -> Any:
    """Returns the value if it obeys the rule.

    Args:
      where: the field's name, for the error.
      value: the value as read.
      rule: what it must be.

    Raises:
      ValueError: the value breaks the rule.

    Example:
      >>> check("rank", 8, whole(1))
      8
      >>> check("rank", True, whole(1))
      Traceback (most recent call last):
      ...
      ValueError: rank=True; it must be an int >= 1 and <= 2147483647
    """
    if not rule.fits(value):
        raise ValueError(f"{where}={shown(value)}; it must be {rule.says}")
    return value


def field(table: Any, name: str, rule: Rule, where: str = "") -> Any:
    """Returns a required field of a table; `where` names the table in errors."""
    check(where or "the whole", table, TABLE)
    if name not in table:
        raise ValueError(f"{where}{': ' if where else ''}there is no {name!r} in it")
    return check(f"{where}{'.' if where else ''}{name}", table[name], rule)


def shown(value: Any) -> str:
    """The value for a message, shortened if long."""
    return _SHORT.repr(value)


def some(names: Sequence[str]) -> str:
    """The first names of a list for a message, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(names[:5]) or "none") + more


# Rules


def whole(least: int = 0, most: int = LARGEST) -> Rule:
    """An int in a range, both ends included."""
    says = f"an int >= {least} and <= {most}"
    return Rule(says, lambda v: type(v) is int and least <= v <= most)


def number(
    least: float = -LARGEST,
    most: float = LARGEST,
    *,
    above: float = -math.inf,
    below: float = math.inf,
) -> Rule:
    """A finite number: from `least` to `most`, more than `above`, less than `below`."""
    parts = [f"> {above:g}" if above > -math.inf else f">= {least:.12g}"]
    parts += [f"< {below:g}" if below < math.inf else f"<= {most:.12g}"]
    return Rule(
        f"a number {' and '.join(parts)}",
        lambda v: (
            type(v) in (int, float)
            and least <= v <= most  # NaN is in no range
            and above < v < below
        ),
    )


def listed(rule: Rule, least: int = 0) -> Rule:
    """A list of at least `least` values that obey one rule."""
    says = f"a list of {least} or more" if least else "a list"
    return Rule(
        f"{says}, each {rule.says}",
        lambda v: (
            isinstance(v, list | tuple) and len(v) >= least and all(map(rule.fits, v))
        ),
    )


def mapping(rule: Rule, least: int = 0) -> Rule:
    """An object of at least `least` values that obey one rule."""
    says = f"an object of {least} or more fields" if least else "an object"
    return Rule(
        says if rule is ANY else f"{says}, each {rule.says}",
        lambda v: (
            isinstance(v, Mapping)
            and len(v) >= least
            and all(map(rule.fits, v.values()))
        ),
    )


def choice(*names: str) -> Rule:
    """One of the given strings."""
    known = f"one of {', '.join(map(repr, names))}"
    return Rule(known, lambda v: isinstance(v, str) and v in names)


def digits(count: int) -> Rule:
    """Text of `count` hexadecimal digits: a digest."""
    return Rule(
        f"{count} hex digits",
        lambda v: isinstance(v, str) and len(v) == count and _HEX.issuperset(v),
    )


FINITE = number(-sys.float_info.max, sys.float_info.max)
FLAG = Rule("true or false", lambda v: isinstance(v, bool))
TEXT = Rule("text", lambda v: isinstance(v, str))
TABLE = Rule("an object", lambda v: isinstance(v, Mapping))
ANY = Rule("anything", lambda v: True)
SHAPE = listed(whole())
ZERO = Rule("null, false or empty", lambda v: v is None or v is False or _empty(v))
"""A value that switches nothing on, whatever the field."""


def _empty(value: Any) -> bool:
    return isinstance(value, str | list | tuple | Mapping) and not value


# JSON


def parsed(text: str, kind: type = dict) -> Any:
    """Returns the object in a JSON text, or the array with `kind=list`.

    Raises:
      ValueError: the text is malformed, nested too deeply, of another kind, or has a
        duplicate key.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"duplicate keys: {', '.join(twice)}")
        return found

    try:
        value = json.loads(text, object_pairs_hook=once)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, kind):
        wanted = "an object" if kind is dict else "an array"
        raise ValueError(f"holds {type(value).__name__}, not {wanted}")
    return value
