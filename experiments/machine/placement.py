"""Where the arrays of a program are placed: on one device, or on a mesh of several.

place = placement.make_place(config.sharding)
batch = place.put(rows)  # this process's part of a batch
"""

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec

from lorax import sharding
from lorax.interop import hf
from lorax.models import table
from lorax.sharding import Placed

Batch = Mapping[str, Any]


class Place(NamedTuple):
    """Where parameters, state and batches are placed.

    Attributes:
      mesh: the devices; None: one device, without any sharding.
      config: `config.sharding`.
    """

    mesh: jax.sharding.Mesh | None = None
    config: Mapping[str, Any] = {}

    def params(self, model: Any, shapes: Any) -> Placed | None:
        """Returns the placement of a model's parameters, by its family's axes."""
        if self.mesh is None:
            return None
        return place_params(self.mesh, self.config, model, shapes)

    def scope(self) -> AbstractContextManager[Any]:
        """Returns a context in which models shard activations along the batch."""
        return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()

    def part(self, rows: int) -> slice:
        """Returns the rows of a batch of `rows` that this process makes.

        Raises:
          ValueError: the devices do not divide the batch, or this process's rows are
            not contiguous.
        """
        if self.mesh is None:
            return slice(None)
        where = sharding.batch_sharding(self.mesh)
        shape = self.mesh.shape  # tensor and context devices have the same rows
        parts = sharding.row_parts(shape)
        if rows % parts:
            raise ValueError(
                f"a batch of {rows} rows cannot be split over "
                f"{' x '.join(a for a in sharding.ROWS if a in shape)} = {parts} "
                "devices; set data.batch_size and eval.batch_size to multiples of it"
            )
        indices = where.addressable_devices_indices_map((rows,)).values()
        own = {index[0].indices(rows)[:2] for index in indices if index}
        begin, end = min(own)[0], max(own)[1]
        if sum(stop - start for start, stop in own) != end - begin:
            raise ValueError(
                f"process {jax.process_index()} has the rows {sorted(own)} of {rows}, "
                "which are not contiguous; put data and fsdp first in the mesh"
            )
        return slice(begin, end)

    def put(self, batch: Batch) -> Batch:
        """Returns the whole batch, to which this process contributes its part."""
        if self.mesh is None:
            return batch
        where = sharding.batch_sharding(self.mesh)
        make = jax.make_array_from_process_local_data
        return {key: make(where, np.asarray(value)) for key, value in batch.items()}


def place_params(
    mesh: jax.sharding.Mesh, config: Mapping[str, Any], model: Any, shapes: Any
) -> Placed:
    """Returns the placement of a model's parameters on a mesh, by its family's axes.

    Args:
      mesh: with Auto axes.
      config: `config.sharding`; its `rules` take precedence over the family's axes.
      model: of `lorax.models`.
      shapes: its parameters, abstract or not.
    """
    own = model.config
    family = hf.family_of(own.to_hf(), "config")
    logical = table.logical_axes(family.entries(own), own.stacks, own.scan)
    rules = [(regex, PartitionSpec(*axes)) for regex, axes in config.get("rules", ())]
    whole = tuple(config.get("may_replicate", ()))
    return sharding.place(shapes, mesh, logical, rules, may_replicate=whole)


ALONE = Place()
"""One device."""


def make_place(config: Mapping[str, Any] | None) -> Place:
    """Returns the place that `config.sharding` describes.

    Args:
      config: sizes of the mesh axes, `sharding.AXES` (-1: the devices that are left),
        all 1 or not given for one device; and `may_replicate`, logical axes that stay
        whole if the mesh does not divide them.

    Raises:
      ValueError: several processes with a mesh of one device, or sizes whose product is
        not the number of devices.
    """
    sizes = {axis: (config or {}).get(axis, 1) for axis in sharding.AXES}
    if set(sizes.values()) != {1}:
        return Place(sharding.make_mesh(**sizes), dict(config or {}))
    if jax.process_count() > 1:
        raise ValueError(
            f"{jax.process_count()} processes, but config.sharding asks for one device;"
            f" set one of {', '.join(sharding.AXES)} (-1: what the others leave)"
        )
    return ALONE
