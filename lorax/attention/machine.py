"""The machine that a program is traced for: its platform, and the mesh that cuts it."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from lorax.sharding.mesh import ROWS

Axes = tuple[str, ...]


def platform() -> str:
    """Returns "cpu", "gpu" or "tpu": of the mesh, which may be one to compile for.

    Without `jax.set_mesh` it is JAX's default one.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def auto(names: Axes) -> Axes:
    """Returns those of these mesh axes that there are, and that are Auto."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(axis for axis in names if kinds.get(axis) == AxisType.Auto)


def parts(axes: Axes) -> int:
    """Returns into how many parts mesh axes cut a dimension."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes)


def cut(names: Axes, size: int) -> Axes:
    """Returns those of the mesh axes that are Auto, none if they do not divide size."""
    axes = auto(names)
    return () if size % parts(axes) else axes


def spread(
    q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[Axes, Axes, jax.Array, jax.Array]:
    """Returns the mesh axes that cut rows, those that cut heads, and keys and values.

    These are repeated where there are fewer heads of them than devices that share them.
    """
    rows, heads = cut(ROWS, q.shape[0]), cut(("tensor",), q.shape[2])
    shared = parts(heads) // math.gcd(parts(heads), k.shape[2])
    if shared > 1:
        k, v = (jnp.repeat(x, shared, axis=2) for x in (k, v))
    return rows, heads, k, v
