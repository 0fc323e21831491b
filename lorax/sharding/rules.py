"""From rules to the PartitionSpec of every parameter.

Three kinds of rules, tried in this order: `(regex, PartitionSpec)`, where the regex
must match the whole path and the first match wins; the logical axes of a model family
(`lorax.models.table.logical_axes`), which a table maps to mesh axes; and the axis names
attached to the parameter itself (`lorax.sharding.boxes`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from lorax import tree
from lorax.quantized import Quantized
from lorax.sharding import boxes
from lorax.sharding import mesh as meshes
from lorax.types import Base, PyTree

LOGICAL: dict[str, str | tuple[str, ...] | None] = {
    "layers": None,  # scanned: each slice is one layer
    "embed": ("fsdp", "expert", "context"),
    "experts": "expert",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,  # rotary positions mix it
    "vocab": "tensor",
}
"""The mesh axes for each logical axis of the model families.

"expert" and "context" are ignored if the mesh has no such axes.
"""


class Row(NamedTuple):
    """How one leaf is placed.

    Attributes:
      path: the leaf's path.
      shape: the leaf's shape.
      spec: one entry for each dimension.
      rule: the regular expression, or the logical axes, that determined the spec.
    """

    path: str
    shape: tuple[int, ...]
    spec: PartitionSpec
    rule: str


@dataclasses.dataclass(frozen=True)
class Placed:
    """The placement of a parameter tree; it prints as a table of what matched.

    Attributes:
      mesh: the mesh of devices.
      rows: one for each leaf, in tree order.
    """

    mesh: Mesh
    rows: tuple[Row, ...]

    @property
    def specs(self) -> dict[str, PartitionSpec]:
        """The spec of every leaf, by path."""
        return {row.path: row.spec for row in self.rows}

    def tree(self, params: PyTree) -> PyTree:
        """Returns a tree like `params` (arrays or shapes), with shardings as leaves.

        Raises:
          ValueError: `params` is a `Base`, whose frozen arrays the adapters place.
        """
        if isinstance(params, Base):
            raise ValueError(
                "params is a Base, and the placement of its frozen arrays depends on "
                "the adapters that use them: use sharding.base_shardings(params, "
                "adapters, placed), or place params.params alone"
            )
        leaves = tree.flatten(params)
        shardings: dict[str, Any] = {}
        for path, spec in self.specs.items():
            leaf, where = leaves.get(path), NamedSharding(self.mesh, spec)
            if isinstance(leaf, Quantized):
                shardings[path] = of_arrays(leaf, where)
            else:
                shardings[path] = where
        return tree.replace(params, shardings)

    def abstract(self, params: PyTree) -> PyTree:
        """Returns `params` as ShapeDtypeStructs with their shardings."""
        return jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=where
            ),
            params,
            self.tree(params),
        )

    def __str__(self) -> str:
        """The table."""
        cells = [(r.path, str(r.shape), _say(r.spec), r.rule) for r in self.rows]
        cells = [("leaf", "shape", "spec", "by"), *cells]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in cells
        )


def of_arrays(leaf: Quantized, where: jax.sharding.Sharding) -> Any:
    """Returns the shardings of a quantised leaf's arrays, which follow its kernel.

    An axis whose tiles do not divide evenly over its mesh axes is not sharded.

    Args:
      leaf: a quantised leaf of arrays, or of their shapes.
      where: the kernel's sharding.
    """
    if not isinstance(where, NamedSharding):
        return jax.tree.map(lambda _: where, leaf)
    mesh, dims = where.mesh, [*where.spec, *[None] * (leaf.ndim - len(where.spec))]
    specs = leaf.specs(dims, lambda dim: axes_size("", dim, mesh))
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def place(
    params: PyTree,
    mesh: Mesh,
    logical: Mapping[str, Sequence[str | None]] | None = None,
    rules: Sequence[tuple[str, PartitionSpec]] = (),
    table: Mapping[str, str | tuple[str, ...] | None] = LOGICAL,
    may_replicate: Sequence[str] = (),
) -> Placed:
    """Chooses a PartitionSpec for every leaf.

    If two logical axes of a leaf map to the same mesh axis, the first one gets it.

    Args:
      params: arrays, or their shapes, boxed (`nn.Partitioned`) or not.
      mesh: see `make_mesh`; Explicit axes work too, if the model is written for them.
      logical: `{path: logical axes}`, from `lorax.models.table.logical_axes(...)`.
      rules: `(regex, spec)`; a regex must match the whole path, the first match wins,
        and rules take precedence over `logical`.
      table: the mesh axes for each logical axis. An axis that the mesh lacks is an
        error.
      may_replicate: logical axes to leave whole if the mesh axis does not divide them,
        such as "kv_heads" if there are fewer of them than tensor devices; for other
        axes that is an error.

    Returns:
      The placement; print it to see what matched.

    Raises:
      ValueError: a leaf matches no rule, a rule matches no leaf, a spec does not fit
        its leaf, or the mesh does not divide an axis.

    Example:
      >>> from lorax.sharding import make_mesh
      >>> mesh = make_mesh(fsdp=1, devices=jax.devices()[:1])
      >>> params = {"up": {"kernel": jax.numpy.ones((4, 6))}}
      >>> print(place(params, mesh, {"up/kernel": ("embed", "mlp")}))
      leaf       shape   spec            by
      up/kernel  (4, 6)  (fsdp, tensor)  embed, mlp
    """
    leaves = tree.flatten(params)
    boxed = boxes.names_of(params)
    named: dict[str, Sequence[str | None]]
    named = {path: own.names for path, own in boxed.items() if own.logical}
    named.update(logical or {})
    for pattern, _ in rules:
        if not any(tree.match(pattern, path) for path in leaves):
            raise ValueError(
                f"sharding rule {pattern!r} matches no leaf; "
                f"{tree.nearest(pattern, leaves)}"
            )
    rows = []
    for path, leaf in leaves.items():
        shape = tuple(leaf.shape)
        spec = next((s for pattern, s in rules if tree.match(pattern, path)), None)
        if spec is not None:
            by = next(pattern for pattern, _ in rules if tree.match(pattern, path))
            entries = _by_regex(path, shape, spec, mesh)
        elif path in named:
            by = ", ".join(str(axis or "-") for axis in named[path])
            entries = _by_name(path, shape, named[path], mesh, table, may_replicate)
        elif path in boxed:
            by = "its own axes"
            spec = PartitionSpec(*boxed[path].names)
            entries = _by_regex(path, shape, spec, mesh)
        else:
            raise ValueError(
                f"{path}: no sharding rule matches; end the rules with "
                "('.*', PartitionSpec()) to replicate the rest"
            )
        rows.append(Row(path, shape, PartitionSpec(*entries), by))
    return Placed(mesh, tuple(rows))


def _by_regex(
    path: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh
) -> list[Any]:
    if len(spec) > len(shape):
        raise ValueError(f"{path}: {spec} has more entries than the shape {shape}")
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    for dim, entry in enumerate(entries):
        require_divides(path, shape, dim, entry, mesh)
    return entries


def _by_name(
    path: str,
    shape: tuple[int, ...],
    names: Sequence[str | None],
    mesh: Mesh,
    table: Mapping[str, str | tuple[str, ...] | None],
    may_replicate: Sequence[str],
) -> list[Any]:
    if len(names) != len(shape):
        raise ValueError(f"{path}: logical axes {names} do not fit the shape {shape}")
    entries: list[Any] = []
    taken: set[str] = set()
    for dim, name in enumerate(names):
        if name is not None and name not in table:
            raise ValueError(
                f"{path}: the logical axis {name!r} is not in the table; it has "
                f"{', '.join(table)}"
            )
        axes = () if name is None else as_axes(table[name])
        absent = {*meshes.OPTIONAL} - set(mesh.shape)
        axes = tuple(axis for axis in axes if axis not in taken | absent)
        whole = name in may_replicate and shape[dim] % axes_size(path, axes, mesh)
        entry = None if whole or not axes else axes[0] if len(axes) == 1 else axes
        require_divides(path, shape, dim, entry, mesh, name)
        taken.update(as_axes(entry))
        entries.append(entry)
    return entries


def as_axes(entry: Any) -> tuple[str, ...]:
    """Returns one entry of a spec as a tuple of mesh axes."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def axes_size(path: str, entry: Any, mesh: Mesh | AbstractMesh) -> int:
    """Returns the number of parts into which an entry of a spec splits a dimension."""
    for axis in as_axes(entry):
        if axis not in mesh.shape:
            raise ValueError(
                f"{path}: the mesh has no axis {axis!r}, only {dict(mesh.shape)}"
            )
    return math.prod(mesh.shape[axis] for axis in as_axes(entry))


def require_divides(
    path: str,
    shape: tuple[int, ...],
    dim: int,
    entry: Any,
    mesh: Mesh,
    name: str | None = None,
) -> None:
    """Raises ValueError unless the devices of a spec's entry divide its dimension."""
    parts = axes_size(path, entry, mesh)
    if shape[dim] % parts:
        said = f"axis {dim}" + (f" ({name})" if name else "")
        raise ValueError(
            f"{path}: {said} of the shape {shape} has size {shape[dim]}, which the "
            f"{parts} devices of {' x '.join(as_axes(entry))} do not divide; use "
            "another mesh, or replicate it"
            + (f" with may_replicate=({name!r},)" if name else " in the rule")
        )


def _say(spec: PartitionSpec) -> str:
    """A spec in short form: `(fsdp, -, data+tensor)`."""
    return "(" + ", ".join("+".join(as_axes(entry)) or "-" for entry in spec) + ")"
