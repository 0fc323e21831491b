"""Estimates a step's time from three terms: products, HBM, transfers between chips.

    products  = operations / the chip's peak in bfloat16
    HBM       = bytes read and written / its bandwidth
    transfers = bytes that cross a chip's links / bandwidth of the links its group uses

Products run at the peak, memory and links at their published bandwidth; neither latency
nor the host is counted. If all three overlap, a step takes the longest of them
(`together`); if none do, their sum (`apart`). Published runs are closer to the sum
(`planning.published`), so tokens per second and MFU are computed from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments.planning import topology as topologies
from experiments.planning import traffic


class Times(NamedTuple):
    """Seconds of a step on one chip.

    Attributes:
      products: of the model itself.
      recomputed: of products that remat computes again.
      hbm: of reading and writing HBM.
      transfers: of receiving from other chips.
    """

    products: float
    recomputed: float
    hbm: float
    transfers: float

    @property
    def together(self) -> float:
        """If all three overlap."""
        return max(self.products + self.recomputed, self.hbm, self.transfers)

    @property
    def apart(self) -> float:
        """If nothing overlaps."""
        return sum(self)


def transfer_seconds(
    collectives: Sequence[traffic.Collective],
    devices: Sequence[Any],
    topology: topologies.Topology,
) -> float:
    """Returns the seconds of all transfers, one after another.

    Args:
      collectives: of one device.
      devices: of the mesh, flattened; `coords` says where in the torus a chip is.
      topology: has the links.
    """
    assert topology.chip is not None
    places = [tuple(device.coords) for device in devices]
    shape = topology.shape
    spans = {one.group: one.group or tuple(range(len(places))) for one in collectives}
    found = {
        group: links([places[i] for i in span], shape, topology.chip.wraps)
        for group, span in spans.items()
    }
    total = 0.0
    for one in collectives:
        crossing = _share(one.kind, len(spans[one.group])) * one.nbytes * one.times
        # permutations come in pairs, one in each direction
        count = 2 if one.kind == "collective-permute" else found[one.group]
        total += crossing / (count * topology.chip.link)
    return total


def links(places: Sequence[tuple[int, ...]], shape: Sequence[int], wraps: int) -> int:
    """Returns over how many links a chip receives what its group gathers.

    Each dimension that the group spans gives one link, or two if it is closed and the
    group goes all the way around.

    Args:
      places: coordinates of the group's chips.
      shape: of the torus.
      wraps: see `topology.Chip`.

    Example:
      >>> links([(0, 0), (0, 1), (1, 0), (1, 1)], (4, 4), 16)
      2
      >>> links([(0, i) for i in range(16)], (16, 16), 16)
      2
    """
    count = 0
    for dim, size in enumerate(shape):
        met = len({place[dim] for place in places})
        closed = size % wraps == 0 and met == size
        count += 0 if met == 1 else 2 if closed else 1
    return max(count, 1)


def _share(kind: str, group: int) -> float:
    """Returns what crosses a chip's links, as a multiple of the transfer's result."""
    rest = (group - 1) / group
    return {
        "all-gather": rest,
        "all-reduce": 2 * rest,
        "reduce-scatter": group - 1,
        "all-to-all": rest,
        "collective-permute": 1,
    }[kind]
