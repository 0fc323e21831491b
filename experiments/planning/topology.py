"""TPU slices: their names, the figures of their chips, and devices to compile for.

libtpu names a slice by its generation and the shape of its torus, in chips: `v5e:4x4`.
The cloud counts chips for v5e and v6e, and TensorCores, two per chip, for v4 and v5p.
"""

import importlib.util
import math
import os
import re
import subprocess
from collections.abc import Sequence
from typing import Any, NamedTuple

CHILD = "LORAX_PLAN_CHILD"
"""Set in the process that has the forced devices."""


class Chip(NamedTuple):
    """One chip of a generation.

    Attributes:
      hbm: bytes that the compiler lets a program use, less than the chip has.
      flops: bf16 operations per second, as published.
      clock: cycles per second: `flops` over what its matrix units do in a cycle.
      bandwidth: bytes per second of HBM, as published.
      link: bytes per second that one link of the torus carries in each direction, as
        published.
      wraps: a dimension of the torus is closed if it is a multiple of this.
    """

    hbm: float
    flops: float
    clock: float
    bandwidth: float
    link: float
    wraps: int


GIB = 2**30
CHIPS = {  # matrix units: 4 of 128 x 128 per core, on v6e 256 x 256
    "v4": Chip(30.75 * GIB, 275e12, 275e12 / (2 * 4 * 128**2 * 2), 1200e9, 50e9, 4),
    "v5e": Chip(15.75 * GIB, 197e12, 197e12 / (4 * 128**2 * 2), 819e9, 50e9, 16),
    "v5p": Chip(95.73 * GIB, 459e12, 459e12 / (2 * 4 * 128**2 * 2), 2765e9, 100e9, 4),
    "v6e": Chip(31.24 * GIB, 918e12, 918e12 / (4 * 256**2 * 2), 1638e9, 100e9, 16),
}
"""HBM: as reported by the compiler of libtpu 0.0.52 when a program needs more. Peaks
and bandwidths: docs.cloud.google.com/tpu/docs, the pages v4, v5e, v5p and v6e. A link
is a share of what they give for a chip: 1,600 Gbps for v5e and 4,800 for v5p, 800 GBps
for v6e in both directions, over four links in two dimensions, or six in three; v4:
arXiv:2304.01433."""

FLAT = {
    1: "1x1",
    4: "2x2",
    8: "2x4",
    16: "4x4",
    32: "4x8",
    64: "8x8",
    128: "8x16",
    256: "16x16",
}
CUBES = {
    8: "2x2x1",
    16: "2x2x2",
    32: "2x2x4",
    64: "2x4x4",
    128: "4x4x4",
    256: "4x4x8",
    512: "4x8x8",
    1024: "8x8x8",
}
SOLID = ("v4", "v5p")
"""Generations with a three-dimensional torus and two cores per chip."""
CLOUD = {
    **{f"v5litepod-{n}": f"v5e:{shape}" for n, shape in FLAT.items()},
    **{f"v6e-{n}": f"v6e:{shape}" for n, shape in FLAT.items()},
    **{f"{kind}-{n}": f"{kind}:{cube}" for kind in SOLID for n, cube in CUBES.items()},
}
"""The cloud's names of slices -> libtpu's."""


class Topology(NamedTuple):
    """A set of devices to compile for.

    Attributes:
      name: libtpu's, or `cpu:8`.
      given: as the user wrote it.
      chips: number of chips.
      chip: the kind of chip; None for the CPU.
      shape: of the torus; () for the CPU.
    """

    name: str
    given: str
    chips: int
    chip: Chip | None
    shape: tuple[int, ...] = ()

    def __str__(self) -> str:
        """Returns the name, with the number of chips."""
        said = f" ({self.given})" if self.given != self.name else ""
        return f"{self.name}{said}: {self.chips} {'chips' if self.chip else 'devices'}"


def parse(name: str) -> Topology:
    """Reads the name of a topology.

    Args:
      name: `v5e:4x4`, `v5p:4x4x4`, a name of the cloud such as `v5p-128`, or `cpu:8`.

    Raises:
      ValueError: any other name.

    Example:
      >>> print(parse("v5p-128"))
      v5p:4x4x4 (v5p-128): 64 chips
    """
    own = CLOUD.get(name, name)
    if found := re.fullmatch(r"cpu:([1-9]\d*)", own):
        return Topology(own, name, int(found[1]), None)
    found = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)", own)
    if not found or found[1] not in CHIPS:
        raise ValueError(
            f"unknown topology {name!r}: give libtpu's name, such as v5e:4x4 or "
            f"v5p:4x4x4 (of {', '.join(CHIPS)}), the cloud's, such as v5litepod-16 or "
            "v5p-128 (which counts cores), or cpu:8"
        )
    shape = tuple(int(n) for n in found[2].split("x"))
    want = 3 if found[1] in SOLID else 2
    if len(shape) != want:
        raise ValueError(
            f"unknown topology {name!r}: {found[1]} slices have {want} dimensions, "
            f"such as {found[1]}:{'x'.join(['4'] * want)}"
        )
    return Topology(own, name, math.prod(shape), CHIPS[found[1]], shape)


def prepare() -> None:
    """Sets what libtpu reads when it is loaded, on a machine without a TPU.

    It must not ask the cloud what this machine is, and may be loaded by several
    processes: nothing runs, so there is no chip to lock.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def devices(topology: Topology) -> list[Any]:
    """Returns the devices of a topology: CPU devices, or TPUs to compile for.

    Raises:
      ModuleNotFoundError: libtpu is not installed.
      ValueError: libtpu knows no such slice, or this process has too few CPU devices.
    """
    import jax

    if topology.chip is None:
        found = jax.devices("cpu")
        if len(found) < topology.chips:
            raise ValueError(
                f"{topology.name}: this process has {len(found)} CPU devices; set "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={topology.chips}, "
                "as `lorax plan` does for its child"
            )
        return found[: topology.chips]
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            "libtpu is not installed; it compiles for TPUs even on machines without "
            "one: pip install -e '.[tpu]', or plan for --topology=cpu:8"
        )
    prepare()
    from jax.experimental import topologies

    # a device is a chip; the two cores of a v4 are two devices unless they are joined
    joined = {"chip_config_name": "megacore"} if topology.name.startswith("v4:") else {}
    try:
        made = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **joined
        )
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"unknown topology {topology.name!r}; libtpu says: {error}"
        ) from None
    return list(made.devices)


def needs_child(topology: Topology) -> bool:
    """Whether the topology's devices need a process of their own."""
    return topology.chip is None and not os.environ.get(CHILD)


def run_with_devices(command: Sequence[str], count: int) -> int:
    """Runs a command in a child with `count` CPU devices; returns its exit code."""
    flag = f"--xla_force_host_platform_device_count={count}"
    env = os.environ | {
        CHILD: "1",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip(),
    }
    return subprocess.run(command, env=env, check=False).returncode
