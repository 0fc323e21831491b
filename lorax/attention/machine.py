"""The machine that a program is traced for: its platform, and the mesh that cuts it."""

from __future__ import annotations

import math

import jax
from jax.sharding import AxisType


def platform() -> str:
    """Returns "cpu", "gpu" or "tpu": of the mesh, which may be one to compile for.

    Without `jax.set_mesh` it is JAX's default one.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def cut(names: tuple[str, ...], size: int) -> tuple[str, ...]:
    """Returns those of the mesh axes that are Auto, none if they do not divide size."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    axes = tuple(axis for axis in names if kinds.get(axis) == AxisType.Auto)
    return () if size % parts(axes) else axes


def parts(axes: tuple[str, ...]) -> int:
    """Returns into how many parts mesh axes cut a dimension."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes)
