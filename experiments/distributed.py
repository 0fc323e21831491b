"""Several processes as one program, and where its arrays lie.

    distributed.initialize(config.distributed)      # before anything asks for devices
    place = distributed.make_place(config.sharding)
    batch = place.put(rows)                         # this process's part of a batch

Every process runs the same program on the same global arrays (JAX's multi-controller
model), so that losses, metrics and what is decoded are the same everywhere; only the
first process writes.
"""

import contextlib
import os
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
COORDINATOR, COUNT, NUMBER = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
)
"""The environment of one process among several on CPU or GPU machines."""


def wanted(config: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> bool:
    """Whether several processes are to run together.

    Args:
      config: `config.distributed`; its `coordinator`, if set, says yes.
      environ: `JAX_COORDINATOR_ADDRESS`, a SLURM step of several tasks (not the shell
        of a job, which has their number too) or a TPU pod's list of hosts say so too.
    """
    hosts = environ.get("TPU_WORKER_HOSTNAMES", "")
    tasks = environ.get("SLURM_NTASKS", 1) if "SLURM_STEP_NODELIST" in environ else 1
    return (
        bool(config["coordinator"])
        or COORDINATOR in environ
        or int(tasks) > 1
        or "," in hosts
    )


def initialize(
    config: Mapping[str, Any], environ: Mapping[str, str] = os.environ
) -> None:
    """Joins the processes, if there are several; to be called before JAX has devices.

    When a process dies, the others are aborted (SIGABRT, from C++) once its heartbeat
    has been missing for `config["heartbeat"]` seconds: no Python code runs then.

    Args:
      config: `config.distributed`: `coordinator` "host:port", `processes`, `process`,
        `heartbeat` in seconds. What is not set comes from the environment.
      environ: see `wanted`.
    """
    if not wanted(config, environ):
        return
    number = lambda value, name: (
        value if value is not None else int(environ[name]) if name in environ else None
    )
    jax.distributed.initialize(
        config["coordinator"] or environ.get(COORDINATOR),
        number(config["processes"], COUNT),
        number(config["process"], NUMBER),
        heartbeat_timeout_seconds=config["heartbeat"],
    )


def is_primary() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


class Place(NamedTuple):
    """Where parameters, state and batches lie.

    Attributes:
      mesh: the devices; None: one device, and nothing is said of any sharding.
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
        """Inside of it, models keep their activations cut along the batch."""
        return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()

    def part(self, rows: int) -> slice:
        """Returns the rows of a batch of `rows` that this process makes.

        Raises:
          ValueError: the devices do not divide the batch, or this process's share of it
            is not one stretch.
        """
        if self.mesh is None:
            return slice(None)
        where = sharding.batch_sharding(self.mesh)
        parts = where.num_devices // self.mesh.shape["tensor"]
        if rows % parts:
            raise ValueError(
                f"a batch of {rows} rows cannot be split over data x fsdp = {parts} "
                "devices; set data.batch_size and eval.batch_size to multiples of it"
            )
        indices = where.addressable_devices_indices_map((rows,)).values()
        own = {index[0].indices(rows)[:2] for index in indices if index}
        begin, end = min(own)[0], max(own)[1]
        if sum(stop - start for start, stop in own) != end - begin:
            raise ValueError(
                f"process {jax.process_index()} has the rows {sorted(own)} of {rows}, "
                "no single stretch; put data and fsdp before tensor in the mesh"
            )
        return slice(begin, end)

    def put(self, batch: Batch) -> Batch:
        """Returns the whole batch, of which this process gives its part."""
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
      mesh: of Auto axes.
      config: `config.sharding`; its `rules` go before the family's axes.
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
      config: sizes of the mesh, `data`, `fsdp` and `tensor` (-1: the rest), all 1 or
        none of them for one device; and `may_replicate`, logical axes that stay whole
        where the mesh does not divide them.

    Raises:
      ValueError: several processes and a mesh of one device, or sizes that do not make
        up the devices.
    """
    sizes = {axis: (config or {}).get(axis, 1) for axis in sharding.AXES}
    if set(sizes.values()) != {1}:
        return Place(sharding.make_mesh(**sizes), dict(config or {}))
    if jax.process_count() > 1:
        raise ValueError(
            f"{jax.process_count()} processes, but config.sharding asks for one device;"
            " set data, fsdp or tensor (-1: all that the others leave)"
        )
    return ALONE
