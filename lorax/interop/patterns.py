r"""Untrusted regular expressions, matched in polynomial time.

Python's `re` backtracks: `(a+)+b` from a downloaded file can block a process for years.
Here a node maps a start to the *set* of ends that it can reach, cached per start, so
the work is bounded by nodes x length^3. A full match exists here iff it does in `re`.

Supported: literals, `.`, classes and escapes, groups, `|`, all greedy and lazy
repetitions, `^ $ \A \Z \b \B`, lookahead. Errors: back-references, lookbehind, flags,
atomic groups and possessive repetitions.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

LIMIT = 4096  # for the characters of a pattern, and for repetitions in braces
DEPTH = 50  # nested groups; the matcher recurses


class _Node(NamedTuple):
    """One construct: its kind, its child nodes, and a value for some kinds."""

    kind: str
    parts: tuple[Any, ...] = ()
    value: Any = None


class Pattern:
    r"""A compiled pattern.

    Args:
      text: the regular expression.

    Raises:
      ValueError: it is not a regular expression, or uses an unsupported construct.

    Example:
      >>> Pattern(r".*\.(q|v)_proj").fullmatch("layers.0.q_proj")
      True
      >>> Pattern("(a+)+b").fullmatch("a" * 60)
      False
    """

    def __init__(self, text: str) -> None:
        """Parses the text."""
        if not isinstance(text, str):
            raise ValueError(f"{text!r} is not a regular expression but {type(text)}")
        if len(text) > LIMIT:
            raise ValueError(
                f"a regular expression of {len(text)} characters; at most {LIMIT}"
            )
        try:
            re.compile(text)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{text!r} is not a regular expression: {error}") from None
        self.text = text
        self._root = _Parser(text).whole()

    def fullmatch(self, name: str) -> bool:
        """True when the whole name matches."""
        return len(name) in self.ends(name, 0)

    def tail(self, name: str) -> bool:
        r"""True when `(.*\.)?(pattern)$` matches: the name, or its last components."""
        memo: dict = {}
        starts = [0, *(i + 1 for i, c in enumerate(name) if c == ".")]
        return any(
            len(name) in _ends(self._root, name, start, memo) for start in starts
        )

    def ends(self, name: str, start: int) -> frozenset[int]:
        """Where a match that begins at `start` can end."""
        return _ends(self._root, name, start, {})


@functools.lru_cache(1024)
def compiled(text: str) -> Pattern:
    """Returns `Pattern(text)`, cached."""
    return Pattern(text)


def _ends(node: _Node, text: str, at: int, memo: dict) -> frozenset[int]:
    key = id(node), at
    if key not in memo:
        memo[key] = frozenset(_reach(node, text, at, memo))
    return memo[key]


def _reach(node: _Node, text: str, at: int, memo: dict) -> Iterable[int]:
    kind = node.kind
    if kind == "char":
        fits = at < len(text) and node.value.fullmatch(text[at])
        return (at + 1,) if fits else ()
    if kind == "assert":  # zero width: `re` checks it here in one step
        return (at,) if node.value.match(text, at) else ()
    if kind == "ahead":
        found = bool(_ends(node.parts[0], text, at, memo))
        return (at,) if found == node.value else ()
    if kind == "either":
        return frozenset().union(*(_ends(p, text, at, memo) for p in node.parts))
    if kind == "sequence":
        reached = frozenset((at,))
        for part in node.parts:
            reached = _step(part, text, reached, memo)
        return reached
    return _repeated(node, text, at, memo)


def _step(node: _Node, text: str, starts: Iterable[int], memo: dict) -> frozenset[int]:
    return frozenset().union(*(_ends(node, text, i, memo) for i in starts))


def _repeated(node: _Node, text: str, at: int, memo: dict) -> Iterable[int]:
    least, most = node.value
    body = node.parts[0]
    reached = frozenset((at,))
    for _ in range(least):
        before, reached = reached, _step(body, text, reached, memo)
        if not reached or reached == before:
            break
    found = new = reached
    left = len(text) if most is None else most - least
    while new and left > 0:
        new = _step(body, text, new, memo) - found
        found |= new
        left -= 1
    return found


class _Parser:
    """Parses a pattern that `re` has accepted."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.depth = text, 0, 0

    def whole(self) -> _Node:
        node = self.either()
        assert self.at == len(self.text)
        return node

    def refuse(self, what: str) -> ValueError:
        return ValueError(
            f"the regular expression {self.text!r} uses {what}, which is not supported "
            "here; rewrite it without, or give a list of names"
        )

    def peek(self, *starts: str) -> bool:
        return self.text.startswith(starts, self.at)

    def take(self, start: str) -> bool:
        if not self.peek(start):
            return False
        self.at += len(start)
        return True

    def either(self) -> _Node:
        parts = [self.sequence()]
        while self.take("|"):
            parts.append(self.sequence())
        return parts[0] if len(parts) == 1 else _Node("either", tuple(parts))

    def sequence(self) -> _Node:
        parts = []
        while self.at < len(self.text) and not self.peek("|", ")"):
            parts.append(self.quantified(self.atom()))
        return _Node("sequence", tuple(parts))

    def atom(self) -> _Node:
        if self.take("("):
            return self.group()
        start = self.at
        if self.take("\\"):
            return self.escape()
        if self.take("["):
            self.take("^")
            self.take("]")  # a leading bracket is a literal
            while not self.take("]"):
                self.at += 2 if self.peek("\\") else 1
            return _Node("char", value=re.compile(self.text[start : self.at]))
        if self.take("^"):
            return _Node("assert", value=re.compile(r"\A"))
        if self.take("$"):
            return _Node("assert", value=re.compile("$"))
        self.at += 1
        one = self.text[start]
        return _Node("char", value=re.compile(one if one == "." else re.escape(one)))

    def escape(self) -> _Node:
        start, letter = self.at - 1, self.text[self.at]
        if letter in "AZbB":
            self.at += 1
            return _Node("assert", value=re.compile("\\" + letter))
        octal = re.compile(r"0[0-7]{0,2}|[0-3][0-7]{2}").match(self.text, self.at)
        if letter.isdigit() and not octal:
            raise self.refuse("a back-reference")
        known = re.compile(r"x..|u.{4}|U.{8}|N\{[^}]*\}", re.S)
        width = octal or known.match(self.text, self.at)
        self.at = width.end() if width else self.at + 1
        return _Node("char", value=re.compile(self.text[start : self.at]))

    def group(self) -> _Node:
        ahead = None
        if self.take("?"):
            if self.take("="):
                ahead = True
            elif self.take("!"):
                ahead = False
            elif self.take("P<"):
                self.at = self.text.index(">", self.at) + 1
            elif not self.take(":"):
                raise self.refuse(f"(?{self.text[self.at]}")
        self.depth += 1
        if self.depth > DEPTH:
            raise self.refuse(f"more than {DEPTH} nested groups")
        inside = self.either()
        self.depth -= 1
        assert self.take(")")
        return inside if ahead is None else _Node("ahead", (inside,), ahead)

    def quantified(self, node: _Node) -> _Node:
        braces = re.compile(r"\{(\d+)\}|\{(\d*),(\d*)\}").match(self.text, self.at)
        if self.take("*"):
            counts: tuple[int, int | None] = (0, None)
        elif self.take("+"):
            counts = (1, None)
        elif self.take("?"):
            counts = (0, 1)
        elif braces:
            self.at = braces.end()
            exact, least, most = braces.groups()
            counts = (int(exact or least or 0), int(exact or most or 0))
            if max(counts) > LIMIT:
                raise self.refuse(f"more than {LIMIT} repetitions")
            if exact is None and not most:
                counts = (counts[0], None)
        else:
            return node
        if self.take("+"):
            raise self.refuse("a possessive repetition")
        self.take("?")  # lazy: changes which match is found, not whether there is one
        return _Node("repeat", (node,), counts)
