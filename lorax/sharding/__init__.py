"""Placement on a mesh of devices: parameters, adapters, optimiser state and batch.

    mesh = sharding.make_mesh(data=1, fsdp=-1, tensor=4)
    placed = sharding.place(abstract, mesh, logical)  # {path: PartitionSpec}
    model, params = hf.load(source, shardings=placed.tree)
    params = jax.device_put(params, sharding.base_shardings(params, adapters, placed))
    state = jax.device_put(state, sharding.state_shardings(state, placed))
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        compiled = step.lower(state, params, batch).compile()

Computation follows data. The only constraint that a model states itself is that
activations are sharded along their batch (`lorax.models.layers.along_batch`); it gets
the mesh from `jax.set_mesh`. Give the step `out_shardings` to keep its state in place.
"""

from lorax.sharding.mesh import (
    AXES,
    OPTIONAL,
    ROWS,
    batch_sharding,
    fetch,
    make_mesh,
    replicated,
    row_parts,
)
from lorax.sharding.rules import LOGICAL, Placed, Row, of_arrays, place
from lorax.sharding.states import (
    CUTS,
    Cut,
    adapter_specs,
    base_shardings,
    spread_specs,
    state_shardings,
)

__all__ = [
    "AXES",
    "CUTS",
    "Cut",
    "LOGICAL",
    "OPTIONAL",
    "ROWS",
    "Placed",
    "Row",
    "adapter_specs",
    "base_shardings",
    "batch_sharding",
    "fetch",
    "make_mesh",
    "of_arrays",
    "place",
    "replicated",
    "row_parts",
    "spread_specs",
    "state_shardings",
]
