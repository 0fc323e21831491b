"""The machine that a program is traced for: its platform, and its mesh."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from lorax.sharding.mesh import ROWS

Axes = tuple[str, ...]


def platform() -> str:
    """Returns the mesh's "cpu", "gpu" or "tpu"; the mesh may be one to compile for.

    Without `jax.set_mesh`, returns JAX's default platform.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def auto(names: Axes) -> Axes:
    """Returns those of the named axes that the mesh has and that are Auto."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(axis for axis in names if kinds.get(axis) == AxisType.Auto)


def parts(axes: Axes) -> int:
    """Returns how many parts the mesh axes cut a dimension into."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes)


def cut(names: Axes, size: int) -> Axes:
    """Returns the named axes that are Auto, or none if they do not divide `size`."""
    axes = auto(names)
    return () if size % parts(axes) else axes


def spread(
    q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[Axes, Axes, jax.Array, jax.Array]:
    """Returns the mesh axes that shard rows, those that shard heads, and k and v.

    k and v are repeated if their heads do not divide evenly over the devices.
    """
    rows, heads = cut(ROWS, q.shape[0]), cut(("tensor",), q.shape[2])
    shared = parts(heads) // math.gcd(parts(heads), k.shape[2])
    if shared > 1:
        k, v = (jnp.repeat(x, shared, axis=2) for x in (k, v))
    return rows, heads, k, v
