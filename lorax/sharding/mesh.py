"""The mesh: devices in three axes, data, fsdp and tensor; and expert, and context."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "expert", "context", "tensor")
"""Copies of the model; slices of leaves, gathered where used; experts; stretches of
rows; slices of products."""

ROWS = ("data", "fsdp", "expert")
"""Those that cut a batch into rows."""

OPTIONAL = ("expert", "context")
"""Those that a mesh lacks where their size is 1."""


def make_mesh(
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
    *,
    context: int = 1,
    expert: int = 1,
) -> Mesh:
    """Returns a mesh of Auto axes over all the devices.

    Args:
      data: groups of devices that each hold the whole model and a part of the batch.
      fsdp: devices that share each leaf, and split the batch further; it is gathered
        layer by layer.
      tensor: devices that split products: heads, the MLP's width, the vocabulary.
      context: devices that split each row of the batch along its tokens, and share
        leaves as those of fsdp do. The keys and values of attention go round among
        them, `lorax.attention.ring`.
      expert: devices that each hold some of a layer's experts, and split the batch and
        share other leaves as those of fsdp do. Tokens go round among them,
        `lorax.models.experts`.
      devices: None for all of `jax.devices()`; or those of a topology to compile for.

    Returns:
      A mesh of the axes AXES, of which those of OPTIONAL are left out where they are 1.
      One size may be -1: what the others leave.

    Raises:
      ValueError: sizes that are none, or do not multiply to the number of devices.

    Example:
      >>> dict(make_mesh(data=1, fsdp=-1, tensor=1, devices=jax.devices()[:1]).shape)
      {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    found = list(jax.devices() if devices is None else devices)
    given = data, fsdp, expert, context, tensor
    sizes = dict(zip(AXES, _sizes(given, len(found)), strict=True))
    sizes = {axis: n for axis, n in sizes.items() if n > 1 or axis not in OPTIONAL}
    shape = tuple(sizes.values())
    try:
        grid = mesh_utils.create_device_mesh(
            shape, found, allow_split_physical_axes=True
        )
    except RuntimeError:  # no assignment along the torus: in the order given
        grid = np.array(found).reshape(shape)
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _sizes(given: tuple[int, ...], devices: int) -> tuple[int, ...]:
    """The sizes with -1 filled in."""
    said = ", ".join(f"{axis}={n}" for axis, n in zip(AXES, given, strict=True))
    if any(type(n) is not int or (n < 1 and n != -1) for n in given):
        raise ValueError(f"mesh {said}: sizes are whole numbers >= 1, or -1 once")
    if given.count(-1) > 1:
        raise ValueError(f"mesh {said}: only one size can be -1, the rest")
    known = math.prod(n for n in given if n != -1)
    if devices % known or (-1 not in given and known != devices):
        raise ValueError(
            f"mesh {said}: {known} devices do not make up the {devices} there are; "
            "set one size to -1, or sizes that multiply to the number of devices"
        )
    return tuple(devices // known if n == -1 else n for n in given)


def row_parts(sizes: Mapping[str, int]) -> int:
    """Returns into how many parts a mesh of these axes cuts a batch."""
    return math.prod(sizes.get(axis, 1) for axis in ROWS)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch's leading axis: over data, fsdp and expert.

    Devices along tensor and context see the same examples: a model cuts their tokens
    itself, once it has embedded them. Every leaf of a batch has that axis.
    """
    axes = tuple(axis for axis in ROWS if axis in mesh.axis_names)
    return NamedSharding(mesh, PartitionSpec(axes))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def fetch(array: Any) -> np.ndarray:
    """Returns a global array as a whole, to every process."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    if array.is_fully_replicated:
        return np.asarray(array.addressable_data(0))
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
