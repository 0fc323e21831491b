"""The placement of adapters and of the optimiser's state, given that of the kernels.

    kernel     [batch, in, out]   (B, I, O)
    a, p       [batch, in, rank]  (B, I, -)        b, q  [batch, rank, out]  (B, -, O)
    magnitude  [batch, out]       (B, O)           lam   [batch, rank]       (B, -)
    value      the leaf's own

A frozen array used by one adapter is placed in the same way; one that several adapters
share is replicated.

So a factor meets its activation sharded as the kernel does, and the branch needs no
collectives beyond those of the kernel's own product. But along the mesh axes that a
factor's spec leaves out, devices hold copies of it and of its moments. Sharding along
"all" axes avoids copies, but gathers a factor where it is used. The rank is never
sharded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.tree_util as jtu
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lorax import tree
from lorax.sharding import mesh as meshes
from lorax.sharding import rules
from lorax.types import Adapters, Axes, Base, PyTree

Cut = Literal["auto", "kernels", "all", "whole"]
CUTS: tuple[Cut, ...] = get_args(Cut)
"""How to place adapters and the arrays that follow them; see `state_shardings`."""
WORTH = 2**29
"""Bytes saved per device from which "auto" means "all": each factor is then gathered in
each pass, which by XLA's estimate costs an 8B model a tenth of its cycles."""


def adapter_specs(
    adapters: Adapters,
    specs: Mapping[str, PartitionSpec],
    replicate: bool = False,
) -> Adapters:
    """Returns adapters with a PartitionSpec in place of every array.

    Args:
      adapters: `{path: Adapter}`, of arrays or their shapes. Extra leading axes, such
        as a population's members, are not sharded.
      specs: the kernels' specs by path: `Placed.specs`.
      replicate: True: every device holds the adapters whole.

    Raises:
      KeyError: an adapter's kernel has no spec.

    Example:
      >>> from lorax.adapters import Lora
      >>> import jax.numpy as jnp
      >>> lora = Lora(jnp.ones((4, 2)), jnp.ones((2, 6)), 1.0, Axes((0,), (1,)))
      >>> made = adapter_specs({"w": lora}, {"w": PartitionSpec("fsdp", "tensor")})
      >>> tuple(made["w"].a), tuple(made["w"].b)
      (('fsdp', None), (None, 'tensor'))
    """
    tree.require(adapters, specs, "placement")

    def placed(path: str, adapter: Any) -> Any:
        found = {}
        for field in adapter.roles:
            ndim = getattr(adapter, field).ndim
            whole = PartitionSpec()
            spec = whole if replicate else _of_field(adapter, field, ndim, specs[path])
            found[field] = spec
        return adapter.replace(**found)

    return tree.map_adapters(placed, adapters)


def base_shardings(params: PyTree, adapters: Adapters, placed: rules.Placed) -> PyTree:
    """Returns the shardings of the params that `lorax.init` returned, in a like tree.

    A frozen array used by one adapter follows its kernel, axis by axis as its `Field`
    says; one that several adapters share is replicated.

    Args:
      params: a `Base`, or plain parameters, for which it is `placed.tree(params)`.
      adapters: those that use the frozen arrays.
      placed: the placement of the parameters.

    Raises:
      KeyError: an adapter's kernel has no spec, or params lack a frozen array.
      ValueError: the mesh does not divide an axis of a frozen array.
    """
    plain, frozen = tree.split(params)
    users: dict[str, list[tuple[str, str]]] = {}
    for path, adapter in adapters.items():
        for field, name in getattr(adapter, "lent", ()):
            users.setdefault(name, []).append((path, field))
    tree.require(users, frozen, "Base")
    if not isinstance(params, Base):
        return placed.tree(plain)
    specs = placed.specs
    tree.require(
        [path for own in users.values() for path, _ in own], specs, "placement"
    )

    def where(name: str, leaf: Any) -> NamedSharding:
        own = users.get(name, [])
        if len(own) != 1:
            return meshes.replicated(placed.mesh)
        ((path, field),) = own
        spec = _of_field(adapters[path], field, leaf.ndim, specs[path])
        return _checked(f"{path}, frozen {name}", leaf, spec, placed.mesh)

    lies: Any = {name: where(name, leaf) for name, leaf in frozen.items()}
    return Base(placed.tree(plain), lies)


def _of_field(
    adapter: Any, field: str, ndim: int, kernel: PartitionSpec
) -> PartitionSpec:
    """The spec of an array; extra leading axes are not sharded."""
    spec = _spec(adapter, adapter.fields[field].words, kernel)
    return PartitionSpec(*[None] * (ndim - len(spec)), *spec)


def _spec(adapter: Any, words: Sequence[str], kernel: PartitionSpec) -> PartitionSpec:
    """The spec of an array whose axes are these words.

    Axes that are not the kernel's are not sharded, nor is the stack if only some of its
    layers have factors.
    """
    if words == ("leaf",):
        return kernel
    axes: Axes = adapter.axes
    entries = [*kernel, *[None] * (len(axes.order) - len(kernel))]
    in_, out, batch = ([entries[axis] for axis in group] for group in axes)
    if getattr(adapter, "layers", None) is not None:  # fewer than the mesh divides
        batch[0] = None
    cut = {"in": in_, "out": out, "batch": batch, "out[1:]": out[1:]}
    return PartitionSpec(*(entry for word in words for entry in cut.get(word, [None])))


def spread_specs(adapters: Adapters, specs: Adapters, mesh: Mesh) -> Adapters:
    """Returns specs extended to use the mesh axes that they leave out.

    Each unused mesh axis goes to the longest input or output axis of the array that it
    divides; ranks and stacks are never sharded further. Explicit mesh axes are skipped:
    there a product states its own sharding, and gathers nothing by itself.

    Args:
      adapters: of arrays or their shapes.
      specs: from `adapter_specs`.
      mesh: the mesh of devices.

    Example:
      >>> from lorax.adapters import Lora
      >>> import jax.numpy as jnp
      >>> mesh = meshes.make_mesh(devices=jax.devices()[:1])
      >>> lora = Lora(jnp.ones((4, 2)), jnp.ones((2, 6)), 1.0, Axes((0,), (1,)))
      >>> placed = adapter_specs({"w": lora}, {"w": PartitionSpec("fsdp", "tensor")})
      >>> tuple(spread_specs({"w": lora}, placed, mesh)["w"].b)
      (None, 'tensor')
    """

    def spread(path: str, adapter: Any) -> Any:
        found = {}
        for field in adapter.roles:
            own = getattr(specs[path], field)
            dims = _linear_axes(adapter, field)
            found[field] = _spread(getattr(adapter, field).shape, own, dims, mesh)
        return adapter.replace(**found)

    return tree.map_adapters(spread, adapters)


def _linear_axes(adapter: Any, field: str) -> list[int]:
    """The axes of an array that are input or output axes of the kernel."""
    words = adapter.fields[field].words
    if words == ("leaf",):
        return []
    axes: Axes = adapter.axes
    counts = {"in": len(axes.in_), "out": len(axes.out), "batch": len(axes.batch)}
    counts["out[1:]"] = len(axes.out) - 1
    cut: list[bool] = []
    for word in words:
        cut += [word in ("in", "out", "out[1:]")] * counts.get(word, 1)
    behind = getattr(adapter, field).ndim - len(cut)  # a population's members
    return [behind + dim for dim, own in enumerate(cut) if own]


def _spread(
    shape: tuple[int, ...], spec: PartitionSpec, dims: Sequence[int], mesh: Mesh
) -> PartitionSpec:
    """The spec of an array, with every unused mesh axis spread over `dims`."""
    entries = [rules.as_axes(e) for e in (*spec, *[None] * (len(shape) - len(spec)))]
    taken = {axis for entry in entries for axis in entry}

    def left(dim: int) -> int:
        return shape[dim] // math.prod(mesh.shape[axis] for axis in entries[dim])

    for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True):
        parts = mesh.shape[axis]
        fits = [dim for dim in dims if left(dim) % parts == 0]
        free = kind == AxisType.Auto and axis not in taken
        if free and parts > 1 and fits:
            longest = max(fits, key=left)
            entries[longest] = (*entries[longest], axis)
    plain = [e[0] if len(e) == 1 else e or None for e in entries]
    return PartitionSpec(*plain)


def state_shardings(state: Any, placed: rules.Placed, cut: Cut = "auto") -> Any:
    """Returns a tree like the state of `lorax.training`, of shardings.

    An array that the optimiser keeps under an adapter's path (moments, accumulated
    gradients, sensitivities) is sharded like the adapter's array of that name and
    shape; failing that, by its shape, like the flattened kernel `[n, in, out]`, its
    inputs or its outputs. Arrays that match none of these, or several with different
    shardings, are replicated, as are counters, keys and the model's own state.

    Args:
      state: a TrainState, of arrays or their shapes.
      placed: the placement of the parameters.
      cut: "kernels": adapters, and the arrays that follow them, are sharded like their
        kernels; "all": they are sharded along the other mesh axes too; "whole": they
        are replicated; "auto": "all" if that saves WORTH bytes per device, else
        "kernels".

    Returns:
      Shardings for `jax.device_put(state, ...)`; with several processes, which cannot
      put keys that way, for `jax.jit(lambda state: state, out_shardings=...)(state)`.

    Raises:
      KeyError: an adapter's kernel has no spec.
      ValueError: the mesh does not divide an axis of a factor, or `cut` is unknown.
    """
    if cut not in CUTS:
        raise ValueError(f"cut={cut!r}; choose one of {', '.join(CUTS)}")
    if cut == "auto":
        near, far = (state_shardings(state, placed, one) for one in ("kernels", "all"))
        return far if _held(state, near) - _held(state, far) >= WORTH else near
    mesh = placed.mesh
    specs = lying = adapter_specs(state.adapters, placed.specs, cut == "whole")
    if cut == "all":
        specs = spread_specs(state.adapters, lying, mesh)
    adapters, lying = (_shardings(state.adapters, own, mesh) for own in (specs, lying))

    def whole(part: PyTree) -> PyTree:
        return jax.tree.map(lambda _: meshes.replicated(mesh), part)

    return state.replace(
        adapters=adapters,
        opt_state=_following(state.opt_state, state.adapters, adapters, lying, mesh),
        model_state=whole(state.model_state),
        step=whole(state.step),
        skipped=whole(state.skipped),
        key=whole(state.key),
    )


def _shardings(adapters: Adapters, specs: Adapters, mesh: Mesh) -> Adapters:
    def of(path: str) -> Any:
        where = lambda leaf, spec: _checked(f"{path}, adapter", leaf, spec, mesh)
        return jax.tree.map(where, adapters[path], specs[path])

    return {path: of(path) for path in adapters}


def _held(state: Any, where: Any) -> int:
    """Bytes of adapters and optimiser state on one device."""

    def held(leaf: Any, own: NamedSharding) -> int:
        return math.prod(own.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    parts = ((s.adapters, s.opt_state) for s in (state, where))
    return sum(jax.tree.leaves(jax.tree.map(held, *parts)))


def _checked(path: str, leaf: Any, spec: PartitionSpec, mesh: Mesh) -> NamedSharding:
    for dim, entry in enumerate(spec):
        rules.require_divides(path, tuple(leaf.shape), dim, entry, mesh)
    return NamedSharding(mesh, spec)


def _following(
    opt_state: Any, adapters: Adapters, shardings: Any, lying: Any, mesh: Mesh
) -> Any:
    """The shardings of an optimiser's state, from the path and shape of each leaf."""
    known = {p: _places(a, shardings[p], lying[p]) for p, a in adapters.items()}

    def follow(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        own = [k.key for k in keys if isinstance(k, jtu.DictKey) and k.key in known]
        fields = known[own[-1]] if own else []
        shape = tuple(getattr(leaf, "shape", ()))
        same = [place for place in fields if place.shape == shape]
        name = _name(keys[-1]) if keys else ""
        specs = [place.spec for place in same if place.field == name]
        specs = specs or [place.spec for place in same]
        if not specs or any(spec != specs[0] for spec in specs):
            return meshes.replicated(mesh)
        return NamedSharding(mesh, specs[0])

    return jtu.tree_map_with_path(follow, opt_state)


class _Place(NamedTuple):
    """An array that an optimiser may keep for an adapter; `field` is "" if derived."""

    field: str
    shape: tuple[int, ...]
    spec: PartitionSpec


def _places(adapter: Any, shardings: Any, lying: Any) -> list[_Place]:
    """The arrays of an adapter, and arrays that can be derived from their axes.

    Args:
      adapter: of arrays or their shapes.
      shardings: of its arrays.
      lying: their shardings if they followed the kernel, as derived arrays do.
    """
    leaves = jtu.tree_flatten_with_path(adapter)[0]
    wheres = jax.tree.leaves(shardings)
    places = [
        _Place(_name(keys[-1]), tuple(leaf.shape), where.spec)
        for (keys, leaf), where in zip(leaves, wheres, strict=True)
    ]
    if not {"a", "b"} <= set(adapter.roles):
        return places
    n = len(adapter.axes.batch)
    a, b = adapter.a, adapter.b
    reads, writes = [*lying.a.spec][:-1], [*lying.b.spec]
    if len(reads) + 1 != a.ndim or a.ndim != n + len(adapter.axes.in_) + 1:
        return places  # replicated, or a population's
    batch, in_, out = reads[:n], reads[n:], writes[n + 1 :]
    both = math.prod(a.shape[n:-1]), math.prod(b.shape[n + 1 :])
    dense = (math.prod(a.shape[:n]), *both)
    flat = (_flat(batch), _flat(in_), _flat(out))
    return [
        *places,
        _Place("", dense, PartitionSpec(*flat)),
        _Place("", a.shape[:-1], PartitionSpec(*batch, *in_)),
        _Place("", a.shape[:n] + b.shape[n + 1 :], PartitionSpec(*batch, *out)),
    ]


def _name(key: Any) -> str:
    return jtu.keystr((key,), simple=True)


def _flat(entries: list[Any]) -> Any:
    """The entry of axes flattened into one: the first's, if no other is sharded."""
    return entries[0] if entries and not any(entries[1:]) else None
