"""The mesh of devices: axes data, fsdp and tensor; optionally expert and context."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "expert", "context", "tensor")
"""Across each, in turn: copies of the model; shards of leaves, gathered where used;
experts; spans of each row's tokens; shards of products."""

ROWS = ("data", "fsdp", "expert")
"""The axes that split a batch into rows."""

OPTIONAL = ("expert", "context")
"""The axes that a mesh does not have if their size is 1."""


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

    One size may be -1, which stands for all the remaining devices.

    Args:
      data: number of device groups that each hold the whole model and a part of the
        batch.
      fsdp: number of devices that share each leaf, which is gathered layer by layer,
        and split the batch further.
      tensor: number of devices that split products: heads, the MLP's width, the
        vocabulary.
      context: number of devices that split each row of the batch along its tokens, and
        share leaves as fsdp does. They pass attention's keys and values around a ring,
        see `lorax.attention.ring`.
      expert: number of devices that each hold some of a layer's experts, and split the
        batch and share other leaves as fsdp does. They exchange tokens, see
        `lorax.models.experts`.
      devices: None for all of `jax.devices()`; or those of a topology to compile for.

    Returns:
      A mesh with the axes AXES, without those of OPTIONAL whose size is 1.

    Raises:
      ValueError: a size is invalid, or the sizes do not multiply to the number of
        devices.

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
    except RuntimeError:  # no assignment fits the torus: keep the order given
        grid = np.array(found).reshape(shape)
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _sizes(given: tuple[int, ...], devices: int) -> tuple[int, ...]:
    """The sizes with -1 filled in."""
    said = ", ".join(f"{axis}={n}" for axis, n in zip(AXES, given, strict=True))
    if any(type(n) is not int or (n < 1 and n != -1) for n in given):
        raise ValueError(f"mesh {said}: sizes are whole numbers >= 1, or -1 once")
    if given.count(-1) > 1:
        raise ValueError(f"mesh {said}: only one size can be -1 (all the rest)")
    known = math.prod(n for n in given if n != -1)
    if devices % known or (-1 not in given and known != devices):
        raise ValueError(
            f"mesh {said}: sizes for {known} devices do not fit the {devices} there "
            "are; set one size to -1, or give sizes that multiply to that number"
        )
    return tuple(devices // known if n == -1 else n for n in given)


def row_parts(sizes: Mapping[str, int]) -> int:
    """Returns the number of parts into which a mesh with these axes splits a batch."""
    return math.prod(sizes.get(axis, 1) for axis in ROWS)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch's leading axis over data, fsdp and expert.

    Devices along tensor and context see the same examples; a model splits their tokens
    itself, once it has embedded them. Every leaf of a batch must have the leading axis.
    """
    axes = tuple(axis for axis in ROWS if axis in mesh.axis_names)
    return NamedSharding(mesh, PartitionSpec(axes))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def fetch(array: Any) -> np.ndarray:
    """Returns the whole of a global array, on every process."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    if array.is_fully_replicated:
        return np.asarray(array.addressable_data(0))
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
