"""What the text of a compiled program says: cycles, and bytes between devices.

Every computation counts as often as the loops around it run. The text is XLA's own,
without promises; what it does not say counts for nothing.
"""

import math
import re
from typing import NamedTuple

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "s4": 4, "u4": 4}
BITS |= {f"{kind}{n}": n for kind in "su" for n in (8, 16, 32, 64)}

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OP = re.compile(r"(?:^|[\s)}\]])([a-z][a-z0-9\-]*)\(")
_CALL = re.compile(
    r"(calls|to_apply|body|condition|branch_computations|called_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One transfer.

    Attributes:
      kind: one of COLLECTIVES.
      shape: of its result on one device, as written, `bf16[8192,7168]`.
      nbytes: of that result.
      times: how often it runs.
    """

    kind: str
    shape: str
    nbytes: int
    times: int


class Facts(NamedTuple):
    """What was read from a program.

    Attributes:
      cycles: XLA's estimates, added up; None where it gives none.
      opaque: kernels not of XLA's making (Pallas), for which it has no cycles.
      collectives: of one device.
    """

    cycles: int | None
    opaque: int
    collectives: tuple[Collective, ...]

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes that one device receives, by kind."""
        found: dict[str, int] = {}
        for one in self.collectives:
            found[one.kind] = found.get(one.kind, 0) + one.nbytes * one.times
        return found


class _Computation(NamedTuple):
    lines: list[str]
    calls: list[tuple[str, str, int]]  # how, which, times


def read(text: str) -> Facts:
    """Reads the text of a compiled program (`compiled.as_text()`)."""
    computations, entry = _split(text)
    times: dict[str, int] = {}
    running: set[str] = set()  # reached by control flow: their lines are scheduled

    def visit(name: str, count: int, scheduled: bool) -> None:
        times[name] = times.get(name, 0) + count
        if scheduled:
            running.add(name)
        for how, other, trips in computations[name].calls:
            if other in computations:
                visit(other, count * trips, scheduled and how in ("body", "branch"))

    visit(entry, 1, True)
    cycles = 0
    collectives: dict[tuple[str, str], Collective] = {}
    for name, n in times.items():
        for line in computations[name].lines:
            found = re.search(r'"estimated_cycles":"(\d+)"', line)
            if found and name in running:
                cycles += n * int(found[1])
            if one := _collective(line, n):
                # the parts of a reduction or a gather may each be written out, with one
                # channel; what `shard_map` exchanges all has the same channel
                channel = re.search(r"channel_id=(\d+)", line)
                parted = one.kind not in ("collective-permute", "all-to-all")
                key = channel[1] if channel and parted else f"{name}{line}"
                collectives.setdefault((one.kind, key), one)
    opaque = text.count('custom_call_target="tpu_custom_call"')
    return Facts(cycles or None, opaque, tuple(collectives.values()))


def _split(text: str) -> tuple[dict[str, _Computation], str]:
    """The computations by name, and which of them is the program."""
    found: dict[str, _Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = found.setdefault(head[2], _Computation([], []))
            entry = head[2] if head[1] else entry
        elif current is not None and _LINE.match(line):
            current.lines.append(line)
    if not entry:
        raise ValueError("this is no text of an HLO module: it has no ENTRY")
    for computation in found.values():
        for line in computation.lines:
            computation.calls.extend(_calls(line, found))
    return found, entry


def _calls(
    line: str, computations: dict[str, _Computation]
) -> list[tuple[str, str, int]]:
    """The computations that an instruction runs, and how often."""
    found = []
    named = {how: re.findall(r"[\w.\-]+", what) for how, what in _CALL.findall(line)}
    for how, names in named.items():
        trips = 1
        if how == "body":
            trips = _trips(line, computations.get(named["condition"][0]))
        control = how in ("body", "branch_computations", "called_computations")
        control |= how == "to_apply" and " call(" in line
        kind = "body" if how == "body" else "branch" if control else "inside"
        found += [(kind, name, trips) for name in names]
    return found


def _trips(line: str, condition: _Computation | None) -> int:
    """How often a loop runs: as noted, or as its condition compares; else once."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
        return int(noted[1])
    said = "\n".join(condition.lines) if condition else ""
    constants = re.findall(r"= [su]\d+\[\][^ ]* constant\((\d+)\)", said)
    return int(constants[0]) if len(constants) == 1 and "direction=LT" in said else 1


def _collective(line: str, times: int) -> Collective | None:
    """The transfer that a line describes; the end of one that was begun is none."""
    made = _LINE.match(line)
    ops = _OP.findall(" " + made[2]) if made else []
    ops = [op for op in ops if op.removesuffix("-start") in COLLECTIVES]
    if not made or not ops:
        return None
    result = made[2][: made[2].index(f"{ops[0]}(")]
    shapes = _SHAPE.findall(result)
    if ops[0] == "all-gather-start":  # (operands, results)
        shapes = shapes[len(shapes) // 2 :]
    elif ops[0] == "collective-permute-start":
        shapes = shapes[1:2]
    nbytes = sum(_bytes(kind, dims) for kind, dims in shapes)
    written = ", ".join(f"{kind}[{dims}]" for kind, dims in shapes)
    return Collective(ops[0].removesuffix("-start"), written, nbytes, times)


def _bytes(kind: str, dims: str) -> int:
    count = math.prod(int(n) for n in dims.split(",") if n)
    return count * BITS.get(kind, 8) // 8
