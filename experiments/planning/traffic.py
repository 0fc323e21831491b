"""What a compiled program moves: between chips, to and from HBM, and to the host.

Every instruction counts as often as the loops around it run; what the text does not
say is not counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from experiments.planning import hlo

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
HOST = 5
"""XLA's number for the host's memory."""
_UNMOVED = {
    "parameter",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "constant",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "opt-barrier",
    *COLLECTIVES,
    *(f"{kind}-start" for kind in COLLECTIVES),
}
"""Instructions that move nothing themselves; transfers are counted separately."""


class Collective(NamedTuple):
    """One transfer.

    Attributes:
      kind: one of COLLECTIVES.
      shape: of its result on one device, as written, `bf16[8192,7168]`.
      nbytes: of that result.
      times: how often it runs.
      group: indices, in the flattened mesh, of the first group of devices; for a
        permutation, of its first pair. Empty: all devices.
    """

    kind: str
    shape: str
    nbytes: int
    times: int
    group: tuple[int, ...] = ()


class Facts(NamedTuple):
    """What was read from a program; bytes are for one device.

    Attributes:
      cycles: the sum of XLA's estimates; None if it gives none.
      opaque: number of custom kernels (Pallas), for which XLA has no cycles.
      collectives: transfers between devices.
      hbm: bytes read from HBM or written to it.
      host: bytes sent to the host's memory or fetched from it.
    """

    cycles: int | None
    opaque: int
    collectives: tuple[Collective, ...]
    hbm: int
    host: int

    def bytes_by_kind(self) -> dict[str, int]:
        """Returns the bytes that one device receives, by kind."""
        found: dict[str, int] = {}
        for one in self.collectives:
            found[one.kind] = found.get(one.kind, 0) + one.nbytes * one.times
        return found


def read(text: str) -> Facts:
    """Reads the text of a compiled program (`compiled.as_text()`).

    Raises:
      ValueError: the text has no ENTRY.
    """
    module = hlo.parse(text)
    cycles = hbm = host = 0
    for name, one, times in module.steps():
        estimate = re.search(r'"estimated_cycles":"(\d+)"', one.rest)
        cycles += times * int(estimate[1]) if estimate else 0
        hbm += times * _moved(one, module.computations[name], module)
        host += times * _to_host(one)
    collectives = tuple(_collectives(module))
    hbm += sum(one.nbytes * one.times for one in collectives)  # what they write
    opaque = text.count('custom_call_target="tpu_custom_call"')
    return Facts(cycles or None, opaque, collectives, hbm, host)


def _collectives(module: hlo.Module) -> list[Collective]:
    """Returns every transfer once, although XLA splits asynchronous ones into parts."""
    found = []
    for _, one, times in module.steps():
        found += [_collective(part, times) for part in _begun(one, module)]
    return found


def _begun(one: hlo.Instruction, module: hlo.Module) -> Iterator[hlo.Instruction]:
    """Yields the transfers that an instruction begins, not those that it continues."""
    if one.op.removesuffix("-start") in COLLECTIVES:
        yield one
    inside = hlo.called(one) or ""
    goes_on = inside.startswith("async_collective_fusion")
    if not goes_on and not one.name.startswith("async-collective-done"):
        for part in module.computations.get(inside, {}).values():
            yield from _begun(part, module)


def _collective(one: hlo.Instruction, times: int) -> Collective:
    shapes: Sequence[hlo.Shape] = one.shapes
    if one.op == "all-gather-start":  # (operands, results)
        shapes = shapes[len(shapes) // 2 :]
    elif one.op == "collective-permute-start":
        shapes = shapes[1:2]
    written = ", ".join(shape.text for shape in shapes)
    nbytes = sum(shape.nbytes for shape in shapes)
    kind = one.op.removesuffix("-start")
    return Collective(kind, written, nbytes, times, group_of(one.rest))


def group_of(text: str) -> tuple[int, ...]:
    """Returns the first group of devices in an instruction's attributes; () for all.

    Example:
      >>> group_of("replica_groups=[2,4]<=[4,2]T(1,0)")
      (0, 2, 4, 6)
      >>> group_of("replica_groups=mesh['a'=2,'b'=4] {'b'}")
      (0, 1, 2, 3)
    """
    number = lambda words: tuple(int(n) for n in re.findall(r"\d+", words))
    if pair := re.search(r"source_target_pairs=\{\{(\d+,\d+)\}", text):
        return number(pair[1])
    if told := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return number(told[1])
    tiled = re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text
    )
    if tiled:
        dims = number(tiled[2])
        order = number(tiled[3]) if tiled[3] else range(len(dims))
        grid = np.arange(math.prod(dims)).reshape(dims).transpose(order)
        return tuple(map(int, grid.reshape(number(tiled[1]))[0]))
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text)
    if not named:
        return ()
    sizes = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
    places = np.arange(math.prod(sizes.values())).reshape([*sizes.values()])
    along = re.findall(r"'(\w+)'", named[2])
    first = tuple(slice(None) if axis in along else 0 for axis in sizes)
    return tuple(map(int, places[first].ravel()))


def _moved(
    one: hlo.Instruction, own: dict[str, hlo.Instruction], module: hlo.Module
) -> int:
    """Returns the bytes of HBM that an instruction reads and writes.

    If a fusion reads or writes a slice of a stack, only the slice counts.
    """
    if one.op in _UNMOVED or one.op.endswith("-done"):
        return 0
    if one.op in ("slice-start", "dynamic-slice-start", "dynamic-update-slice-start"):
        return min(shape.nbytes for shape in one.shapes if shape.nbytes > 4)
    if one.op.endswith("-start"):  # its result repeats what it reads
        return sum(shape.nbytes for shape in one.shapes if shape.space == 0)
    inside = module.computations.get(hlo.called(one) or "", {})
    total = _written(one, inside)
    for place, name in enumerate(one.operands):
        given = own.get(name)
        shapes = given.shapes if given else ()
        held = sum(shape.nbytes for shape in shapes if shape.space == 0)
        total += min(held, _read(place, inside, module, held)) if inside else held
    return total


def _written(one: hlo.Instruction, inside: dict[str, hlo.Instruction]) -> int:
    """Returns an instruction's result bytes in HBM; of an updated stack, the part."""
    roots = [i for i in inside.values() if i.root]
    parts = roots
    if roots and roots[0].op == "tuple":
        parts = [inside[name] for name in roots[0].operands if name in inside]
    total = 0
    for place, shape in enumerate(one.shapes):
        made = parts[place] if place < len(parts) else None
        while made and made.op == "bitcast" and made.operands[0] in inside:
            made = inside[made.operands[0]]
        whole = shape.nbytes
        if made and (made.op == "parameter" or made.op in COLLECTIVES):
            whole = 0  # passed on, or counted separately
        elif made and made.op == "dynamic-update-slice" and made.operands[1] in inside:
            whole = sum(part.nbytes for part in inside[made.operands[1]].shapes)
        total += whole if shape.space == 0 else 0
    return total


def _read(
    place: int, inside: dict[str, hlo.Instruction], module: hlo.Module, held: int
) -> int:
    """Returns the bytes that a fusion reads of its operand number `place`."""
    own = [
        i
        for i in inside.values()
        if i.op == "parameter" and i.rest.lstrip("(").split()[0] == str(place)
    ]
    return _used(own[0].name, inside, module, held) if own else held


def _used(
    name: str, inside: dict[str, hlo.Instruction], module: hlo.Module, held: int
) -> int:
    """Returns the bytes of a value that its readers in a fusion read."""
    total = 0
    for reader in inside.values():
        if name not in reader.operands or reader.op in ("tuple", *COLLECTIVES):
            continue  # passed on, or counted separately
        if reader.op in ("dynamic-slice", "slice"):
            total += sum(shape.nbytes for shape in reader.shapes)
        elif reader.op == "dynamic-update-slice" and reader.operands[0] == name:
            continue  # updated in place
        elif reader.op == "bitcast":
            total += _used(reader.name, inside, module, held)
        elif reader.op == "fusion":
            within = module.computations.get(hlo.called(reader) or "", {})
            for place, operand in enumerate(reader.operands):
                if operand == name:
                    total += _read(place, within, module, held)
        else:
            return held
    return total


def _to_host(one: hlo.Instruction) -> int:
    """Returns the bytes that an instruction moves to or from the host's memory."""
    if one.op not in (
        "dynamic-slice-start",
        "dynamic-update-slice-start",
        "copy-start",
    ):
        return 0
    far = [shape for shape in one.shapes if shape.space == HOST]
    near = [s for s in one.shapes if s.space != HOST and s.nbytes > 4]
    return min(s.nbytes for s in near) if far and near else 0
