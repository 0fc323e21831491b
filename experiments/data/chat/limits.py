"""Limits on what a chat template may use: time, output, the size of any value."""

import contextlib
import contextvars
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

# Characters of one value, and the largest integer a call may be given: enough for a
# very long document, and one string operation still takes well under a second.
LARGEST = 1_000_000


class Limits(NamedTuple):
    """What one rendering may use."""

    seconds: float = 2.0
    characters: int = 4_000_000  # of output; a book has about one million


class LimitError(Exception):
    """A template went over a limit."""


class _Budget:
    """What the current rendering may still use."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.deadline = time.monotonic() + limits.seconds
        self.characters = limits.characters

    def spend(self, characters: int) -> None:
        """Counts output and checks the time."""
        self.characters -= characters
        if self.characters < 0:
            raise LimitError(f"it writes more than {self.limits.characters} characters")
        if time.monotonic() > self.deadline:
            raise LimitError(
                f"it runs for more than {self.limits.seconds} s: does it loop?"
            )


_budget: contextvars.ContextVar[_Budget] = contextvars.ContextVar("budget")


@contextlib.contextmanager
def limited(limits: Limits) -> Iterator[None]:
    """Sets one budget for all renderings inside."""
    token = _budget.set(_Budget(limits))
    try:
        yield
    finally:
        _budget.reset(token)


def spend(characters: int) -> str:
    """Counts against the rendering's budget; while compiling there is none."""
    budget = _budget.get(None)
    if budget is not None:
        budget.spend(characters)
    return ""


# Calls that only pass on the numbers they are given.
PASSING = frozenset(["", "Namespace", "dict", "format", "get", "spend"])


def check_arguments(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], exempt: int = 0
) -> None:
    """Checks the time and the arguments of a call.

    The first `exempt` arguments may be any number: a filter's first is its value.
    """
    spend(0)
    for value in (*args, *kwargs.values()):
        bounded(value)
    if name not in PASSING:
        for value in (*args[exempt:], *kwargs.values()):
            if isinstance(value, int):
                bound(abs(value), f"a number given to {name!r}")
    if name in ("format", "replace"):  # may multiply two sizes
        one, other = sorted(size(v) for v in (*args, *kwargs.values(), "", ""))[-2:]
        bound(one * other // 100, f"what {name!r} may make")
    if name == "format" and args and isinstance(args[0], str):
        # widths of five digits, or taken from an argument
        if re.search(r"\d{5,}|%[^%\s]*\*|\{[^}]*\{", args[0].replace("{{", "")):
            raise LimitError("a format has a width over 9999 or one by argument")


def bounded(value: Any) -> Any:
    """Returns the value, or raises if it is too large."""
    bound(size(value), "a value")
    return value


def bound(size: int, what: str) -> None:
    """Raises if a size is over the bound."""
    if size > LARGEST:
        raise LimitError(f"{what} is larger than {LARGEST}")


def size(value: Any) -> int:
    """Counts characters and elements of a value, nested too, up to the bound."""
    size, rest = 0, [value]
    while rest and size <= LARGEST:
        value = rest.pop()
        if isinstance(value, str | bytes):
            size += len(value)
        elif isinstance(value, int):
            size += value.bit_length() // 8
        elif isinstance(value, dict):
            size += len(value)
            rest += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            size += len(value)
            rest += value
    return size


def pieces(values: Any, separator: str) -> list[str]:
    """Returns the strings to join, after counting the size of each."""
    pieces = []
    for value in values:
        spend(size(bounded(value)) + len(separator))
        pieces.append(str(value))
    return pieces
