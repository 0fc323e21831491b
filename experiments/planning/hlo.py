"""Parses the text of a compiled program into instructions, and how often each runs.

The text is XLA's own, and its format comes without guarantees.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "s4": 4, "u4": 4}
BITS |= {f"{kind}{n}": n for kind in "su" for n in (8, 16, 32, 64)}

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OP = re.compile(r"(?:^|[\s)}\]])([a-z][a-z0-9\-]*)\(")
_CALL = re.compile(
    r"(calls|to_apply|body|condition|branch_computations|called_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")


class Shape(NamedTuple):
    """An array.

    Attributes:
      text: as written, `bf16[8192,7168]`.
      nbytes: of all elements.
      space: where it is: 0 in HBM, 5 in the host's memory, else on the chip.
    """

    text: str
    nbytes: int
    space: int


class Instruction(NamedTuple):
    """One line.

    Attributes:
      name: of its result.
      op: the operation.
      shapes: of its result, or of a tuple's parts.
      operands: names of its operands.
      root: whether its result is the computation's.
      rest: of the line, after the operands.
    """

    name: str
    op: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    root: bool
    rest: str


class Module(NamedTuple):
    """A program.

    Attributes:
      computations: computation -> instruction -> `Instruction`, by name.
      times: how often each computation runs in one run of the program.
      scheduled: computations reached by control flow, whose lines run one after
        another; the others are parts of a single instruction.
    """

    computations: dict[str, dict[str, Instruction]]
    times: dict[str, int]
    scheduled: frozenset[str]

    def steps(self) -> Iterator[tuple[str, Instruction, int]]:
        """Yields `(computation, instruction, times)` for scheduled instructions."""
        for name in self.scheduled:
            for instruction in self.computations[name].values():
                yield name, instruction, self.times[name]


def parse(text: str) -> Module:
    """Reads the text of a compiled program (`compiled.as_text()`).

    Raises:
      ValueError: the text has no ENTRY.
    """
    computations, entry = _split(text)
    calls = {
        name: [call for one in own.values() for call in _calls(one, computations)]
        for name, own in computations.items()
    }
    times: dict[str, int] = {}
    scheduled: set[str] = set()

    def visit(name: str, count: int, runs: bool) -> None:
        times[name] = times.get(name, 0) + count
        if runs:
            scheduled.add(name)
        for control, other, trips in calls[name]:
            if other in computations:
                visit(other, count * trips, runs and control)

    visit(entry, 1, True)
    return Module(computations, times, frozenset(scheduled))


def called(instruction: Instruction) -> str | None:
    """Returns the computation that a fusion calls."""
    found = re.search(r"\bcalls=%?([\w.\-]+)", instruction.rest)
    return found[1] if found else None


def _split(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Returns the computations by name, and the name of the entry."""
    found: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = found.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif current is not None and (one := _instruction(line)):
            current[one.name] = one
    if not entry:
        raise ValueError("this is not the text of an HLO module: it has no ENTRY")
    return found, entry


def _instruction(line: str) -> Instruction | None:
    made = _LINE.match(line)
    op = _OP.search(" " + made[3]) if made else None
    if not made or not op:
        return None
    result, behind = made[3][: op.start(1) - 1], made[3][op.end() - 1 :]
    inside, _, rest = behind.partition(")")
    shapes = tuple(_shape(*found) for found in _SHAPE.findall(result))
    # a constant's text is not a name
    operands = () if op[1] == "constant" else tuple(re.findall(r"%([\w.\-]+)", inside))
    value = f"{inside} " if op[1] in ("constant", "parameter") else ""
    return Instruction(made[2], op[1], shapes, operands, bool(made[1]), value + rest)


def _shape(kind: str, dims: str, layout: str) -> Shape:
    count = math.prod(int(n) for n in dims.split(",") if n)
    space = _SPACE.search(layout)
    nbytes = count * BITS.get(kind, 8) // 8
    return Shape(f"{kind}[{dims}]", nbytes, int(space[1]) if space else 0)


def _calls(
    instruction: Instruction, computations: dict[str, dict[str, Instruction]]
) -> list[tuple[bool, str, int]]:
    """Returns `(by control flow, name, trips)` of what an instruction calls."""
    found = []
    named = {
        how: re.findall(r"[\w.\-]+", what)
        for how, what in _CALL.findall(instruction.rest)
    }
    for how, names in named.items():
        trips = 1
        if how == "body":
            condition = computations.get(named["condition"][0], {})
            trips = _trips(instruction, condition)
        control = how in ("body", "branch_computations", "called_computations")
        control |= how == "to_apply" and instruction.op == "call"
        found += [(control, name, trips) for name in names]
    return found


def _trips(loop: Instruction, condition: dict[str, Instruction]) -> int:
    """Returns a loop's trip count: as noted, or from its condition; else 1."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(noted[1])
    said = condition.values()
    less = any("direction=LT" in one.rest for one in said)
    limits = [
        one.rest.split()[0]
        for one in said
        if one.op == "constant" and re.fullmatch(r"[su]\d+\[\]", one.shapes[0].text)
    ]
    return int(limits[0]) if less and len(limits) == 1 else 1
