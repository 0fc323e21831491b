"""Explicitly sharded values: reading their types, and operations that name a sharding.

On a mesh whose axes are `AxisType.Explicit`, the type of a value says which mesh axes
shard each of its dimensions, and an operation whose result could be sharded in more
than one way has to name its sharding. Without such axes, everything here is the plain
operation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from lorax import tree

Entry = str | tuple[str, ...] | None
"""The mesh axes that shard a dimension: one name, several, or none."""
Entries = Sequence[Any]
"""The mesh axes that shard each dimension."""


def entries(x: Any) -> list[Any]:
    """Returns the sharding entry of each dimension of an array."""
    return lies(jax.typeof(x))


def lies(kind: Any) -> list[Any]:
    """Returns the sharding entry of each dimension of a type."""
    found = kind.sharding.spec.partitions
    return [*found, *[None] * (len(kind.shape) - len(found))]


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape, dtype and sharding of an array or a `ShapeDtypeStruct`."""
    kind = jax.typeof(leaf)
    where = None if kind.sharding.mesh.empty else kind.sharding
    return jax.ShapeDtypeStruct(kind.shape, kind.dtype, sharding=where)


def under(*values: Any) -> Any:
    """Returns the context in which to emit operations: the mesh of the values' types.

    Inside `jax.sharding.auto_axes` the mesh differs from the caller's.
    """
    mesh, given = mesh_of(*values), jax.sharding.get_abstract_mesh()
    if mesh is None or given.empty or mesh == given:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh)


def mesh_of(*values: Any) -> AbstractMesh | None:
    """Returns the first mesh among the arrays' types, or None."""
    meshes = (jax.typeof(x).sharding.mesh for x in values)
    return next((mesh for mesh in meshes if not mesh.empty), None)


def is_explicit(*values: Any) -> bool:
    """True if any of the values is on a mesh with Explicit axes."""
    return any(
        AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types for x in values
    )


def named(wanted: Entries, *values: Any) -> NamedSharding | None:
    """Returns the sharding to name for a result of `values`, or None if none is needed.

    A mesh axis shards one dimension only: the first that asks for it.
    """
    mesh = mesh_of(*values)
    if mesh is None or not is_explicit(*values):
        return None
    return NamedSharding(mesh, PartitionSpec(*_distinct(wanted)))


def _distinct(wanted: Entries) -> list[Any]:
    taken: set[str] = set()
    found = []
    for entry in wanted:
        axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
        own = tuple(axis for axis in axes if axis not in taken)
        taken.update(own)
        found.append(entry if own == axes else (own or None))
    return found


def moved(x: jax.Array, wanted: Entries | PartitionSpec, beside: Any) -> jax.Array:
    """Returns x, resharded to `wanted` on the mesh of `beside` where it differs."""
    mesh = mesh_of(beside)
    if mesh is None or not is_explicit(x, beside):
        return x
    spec = wanted if isinstance(wanted, PartitionSpec) else PartitionSpec(*wanted)
    kind = jax.typeof(x).sharding
    if kind.mesh == mesh and kind.spec == spec:
        return x
    place: Any = mesh
    if tree.is_concrete(beside):  # outside a traced program x may be on no mesh
        place = getattr(beside.sharding, "mesh", mesh)
    return jax.sharding.reshard(x, NamedSharding(place, spec))


def like(x: jax.Array, other: jax.Array) -> jax.Array:
    """Returns x, sharded like the array it is to be added to or multiplied by."""
    spec = jax.typeof(other).sharding.spec
    if x.shape == other.shape:
        return moved(x, spec, other)
    both = zip(x.shape, other.shape, entries(other), strict=True)
    return moved(x, [entry if n == m else None for n, m, entry in both], other)


def summed(x: jax.Array) -> jax.Array:
    """Returns x with any pending (unreduced) sum over devices carried out."""
    return moved(x, entries(x), x)


def dot(
    x: jax.Array,
    y: jax.Array,
    numbers: Any,
    precision: jax.lax.PrecisionLike = None,
    *,
    dtype: Any = None,
    wanted: Entries | None = None,
) -> jax.Array:
    """`jax.lax.dot_general`, naming the sharding of its result.

    Args:
      x: the left operand.
      y: the right operand.
      numbers: dimension numbers, as for `dot_general`.
      precision: as for `dot_general`.
      dtype: the result's dtype.
      wanted: the result's sharding; by default that of the operands' dimensions.
    """
    if wanted is None:
        wanted = _of_product(x, y, numbers)
    if is_explicit(x, y):
        x, y = _batched_alike(x, y, numbers[1])
    return jax.lax.dot_general(
        x,
        y,
        numbers,
        precision,
        preferred_element_type=dtype,
        out_sharding=named(wanted, x, y),
    )


def _of_product(x: jax.Array, y: jax.Array, numbers: Any) -> list[Any]:
    (x_read, y_read), (x_batch, y_batch) = numbers
    of_x, of_y = entries(x), entries(y)
    return [
        *(of_x[i] or of_y[j] for i, j in zip(x_batch, y_batch, strict=True)),
        *(of_x[d] for d in range(x.ndim) if d not in (*x_read, *x_batch)),
        *(of_y[d] for d in range(y.ndim) if d not in (*y_read, *y_batch)),
    ]


def _batched_alike(x: jax.Array, y: jax.Array, batch: Any) -> tuple[jax.Array, ...]:
    """The operands with batch dimensions sharded alike, as a product requires."""
    of_x, of_y = entries(x), entries(y)
    both = [of_x[i] or of_y[j] for i, j in zip(*batch, strict=True)]

    def settled(operand: jax.Array, dims: Sequence[int], own: list[Any]) -> jax.Array:
        order = [*dims, *(d for d in range(operand.ndim) if d not in dims)]
        found = _distinct([*both, *(own[d] for d in order[len(dims) :])])
        own = [found[order.index(d)] for d in range(operand.ndim)]
        return moved(
            operand, own, operand if mesh_of(operand) else (y, x)[operand is y]
        )

    return settled(x, batch[0], of_x), settled(y, batch[1], of_y)


def reshape(x: jax.Array, shape: Iterable[int], wanted: Entries) -> jax.Array:
    """`jax.lax.reshape`, naming the sharding of its result."""
    return jax.lax.reshape(x, tuple(shape), out_sharding=named(wanted, x))


def automatic(function: Callable[..., Any], args: Any, results: Any) -> Any:
    """Returns `function(*args)`, leaving shardings inside it to the compiler.

    Args:
      function: takes trees of arrays; other leaves of `args` reach it unchanged.
      args: if none has an Explicit axis, this is the plain call.
      results: arrays whose shardings the result, or parts of it, take; where one is
        None, that part is replicated.
    """
    flat, structure = jax.tree.flatten(args)
    arrays = [i for i, leaf in enumerate(flat) if isinstance(leaf, jax.Array)]
    given = [flat[i] for i in arrays]
    mesh = mesh_of(*given)
    if mesh is None or not is_explicit(*given):
        return function(*args)

    def called(*values: jax.Array) -> Any:
        leaves = list(flat)
        for i, value in zip(arrays, values, strict=True):
            leaves[i] = value
        return function(*jax.tree.unflatten(structure, leaves))

    def place(x: jax.Array | None) -> NamedSharding:
        lies = [] if x is None else entries(x)
        return NamedSharding(mesh, PartitionSpec(*lies))

    where = jax.tree.map(place, results, is_leaf=lambda x: x is None)

    def run(*values: jax.Array) -> Any:
        with jax.sharding.use_abstract_mesh(mesh):
            return jax.sharding.auto_axes(called, out_sharding=where)(*values)

    outside = jax.sharding.get_abstract_mesh().empty  # new values would have no mesh
    return (jax.jit(run) if outside else run)(*given)
