"""Maps of whole inputs, which are not thin products, on rows of a kernel's own axes.

    y = (x + x D) @ W0 + C(x)

A map takes rows `[n, in]` in the leaf's own order of axes, so an activation is brought
into that order and back. Views may permute and flatten the axes that a map acts on;
where one cuts, flips or splits them, the kernel is merged. A transposed use applies
the transposed maps, D to the result and C to the activation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from lorax import _explicit, linalg
from lorax.interpret.terms.tracked import Term
from lorax.types import LinearMap, PyTree

Name = tuple[str, int]
Names = list[list[Name]]
"""For each dimension of an array, what it is made of, the slowest first."""


def follows(term: Term, groups: Sequence[tuple[Sequence[int], Sequence[int]]]) -> bool:
    """True if a reshape splits no axis on which a map acts."""
    rigid = () if term.factors is None else term.factors.rigid
    return not any(
        len(new) > 1 and any(term.kind(d) in rigid for d in old) for old, new in groups
    )


def dense(term: Term, value: jax.Array) -> list[jax.Array]:
    """Returns what the maps of a term add to a view: `D W0` and C in its layout."""
    if term.factors is None or not term.factors.maps:
        return []
    wide = linalg.wide(value.dtype)
    start, stop = (
        term.start,
        [s + n for s, n in zip(term.start, term.shape, strict=True)],
    )
    block = jax.lax.slice(value, start, stop).astype(wide)
    places = {d: d for d in range(block.ndim)}
    found = []
    with jax.default_matmul_precision("highest"):
        if term.factors.inputs is not None:
            # the columns of the kernel are rows to the transposed map: D w
            names = named(term, places, block.ndim, "in")
            back = transposed(term.factors.inputs, size(term, "in"))
            ends = names, "in"
            found.append(
                applied(back, term, block, given=ends, wanted=ends, like=block)
            )
        if term.factors.branch is not None:
            found.append(_written(term, block, places))
    if block.shape == value.shape:
        return found
    padding = [
        (lo, full - hi, 0)
        for lo, hi, full in zip(start, stop, value.shape, strict=True)
    ]
    return [jax.lax.pad(part, jnp.zeros((), wide), padding) for part in found]


def _written(term: Term, block: jax.Array, places: Mapping[int, int]) -> jax.Array:
    """C of the identity, in the layout of the view's block."""
    assert term.factors is not None and term.factors.branch is not None
    n = size(term, "in")
    stack = [term.shape[d] for d in term.dims("batch")]
    rows = jnp.broadcast_to(jnp.eye(n, dtype=block.dtype), (*stack, n, n))
    # the rows are the inputs: its dimensions of kind "in" are free ones there
    given: Names = [[("stack", i)] for i in range(len(stack))]
    reads = _leaf_axes(term, "in")
    given += [[("row", axis) for axis in reads], [("leaf", axis) for axis in reads]]
    wanted = [
        [("row", axis) if kind == "leaf" and axis in reads else (kind, axis)]
        for group in _both(term, places, block.ndim)
        for kind, axis in group
    ]
    own = term.factors.branch
    read, write = (given, "in"), (wanted, "out")
    made = applied(own, term, rows, given=read, wanted=write, like=None)
    return made.reshape(block.shape)


def _both(term: Term, places: Mapping[int, int], ndim: int) -> Names:
    """The names of a view's dimensions, in and out axes alike."""
    reads = named(term, places, ndim, "in")
    writes = named(term, places, ndim, "out")
    return [
        r if term.kind(d) == "in" else w
        for d, (r, w) in enumerate(zip(reads, writes, strict=True))
    ]


def named(term: Term, places: Mapping[int, int], ndim: int, kind: str) -> Names:
    """Names the dimensions of an array.

    Args:
      term: whose dimensions they are.
      places: for dimensions of the view, where the array has them.
      ndim: of the array.
      kind: "in" or "out": its axes are named by the leaf's, the stack's by their
        number, and all others are free, numbered in order.
    """
    stack, found = term.dims("batch"), dict(zip(places.values(), places, strict=True))
    names: Names = []
    free = 0
    for i in range(ndim):
        dim = found.get(i)
        if dim is not None and dim in stack:
            names.append([("stack", stack.index(dim))])
        elif dim is not None and term.kind(dim) in (kind, "unit"):
            own = term.sized(term.labels[dim])
            names.append([("leaf", axis) for axis in term.labels[dim] if axis in own])
        else:
            names.append([("free", free)])
            free += 1
    return names


def _leaf_axes(term: Term, kind: str) -> list[int]:
    """The leaf's axes of one kind that are longer than one, in the adapter's order."""
    assert term.axes is not None
    axes = term.axes.in_ if kind == "in" else term.axes.out
    return [axis for axis in axes if term.leaf[axis] > 1]


def size(term: Term, kind: str) -> int:
    """Returns the size of the leaf's axes of one kind, flattened."""
    return math.prod(term.leaf[axis] for axis in _leaf_axes(term, kind))


def transposed(held: LinearMap, n: int) -> LinearMap:
    """The map of rows `y -> y M^T`, for a map `[.., n] -> [.., m]`."""

    def apply(arrays: PyTree, y: jax.Array) -> jax.Array:
        like = jax.ShapeDtypeStruct((y.shape[0], n), y.dtype)
        return jax.linear_transpose(lambda x: held.apply(arrays, x), like)(y)[0]

    return LinearMap(held.arrays, apply)


def applied(
    held: LinearMap,
    term: Term,
    x: jax.Array,
    *,
    given: tuple[Names, str],
    wanted: tuple[Names, str],
    like: jax.Array | jax.core.ShapedArray | None,
) -> jax.Array:
    """Applies a map to an array's rows, in at least float32.

    Args:
      held: the map.
      term: whose map it is.
      x: the array.
      given: the names of its dimensions, and the kind that the map reads.
      wanted: those of the result, and the kind that the map writes.
      like: array whose sharding on a mesh the result takes; None: whole on each device.
    """
    wide = linalg.wide(x.dtype)
    names, read = given

    def run(held: LinearMap, x: jax.Array) -> jax.Array:
        sizes = _sizes(term, names, x.shape)
        rows, rest = _rows(x.astype(wide), names, sizes, _leaf_axes(term, read))
        apply: Callable[[PyTree, jax.Array], jax.Array] = held.apply
        for _ in term.dims("batch"):
            apply = jax.vmap(apply)
        arrays = jax.tree.map(lambda f: f.astype(wide), held.arrays)
        return _placed(apply(arrays, rows), rest, wanted, term, sizes)

    return _explicit.automatic(run, (held, x), like)


def _sizes(term: Term, names: Names, shape: Sequence[int]) -> dict[Name, int]:
    """The size behind every name."""
    sizes: dict[Name, int] = {}
    for group, size in zip(names, shape, strict=True):
        for kind, i in group:
            sizes[kind, i] = term.leaf[i] if kind in ("leaf", "row") else size
    return sizes


def _rows(
    x: jax.Array, names: Names, sizes: Mapping[Name, int], last: Sequence[int]
) -> tuple[jax.Array, list[Name]]:
    """Returns `[*stack, n, read]`, and the names that n is made of, in order."""
    flat = [name for group in names for name in group]
    stack = sorted(name for name in flat if name[0] == "stack")
    ends = [("leaf", axis) for axis in last]
    rest = [name for name in flat if name not in (*stack, *ends)]
    x = x.reshape([sizes[name] for name in flat])
    x = x.transpose([flat.index(name) for name in (*stack, *rest, *ends)])
    of = lambda names: [sizes[name] for name in names]
    return x.reshape(*of(stack), math.prod(of(rest)), math.prod(of(ends))), rest


def _placed(
    rows: jax.Array,
    rest: Sequence[Name],
    wanted: tuple[Names, str],
    term: Term,
    sizes: Mapping[Name, int],
) -> jax.Array:
    """Undoes `_rows` for a result `[*stack, n, written]`."""
    names, kind = wanted
    ends = [("leaf", axis) for axis in _leaf_axes(term, kind)]
    known = {**sizes, **{name: term.leaf[name[1]] for name in ends}}
    stack = sorted(name for name in known if name[0] == "stack")
    have = [*stack, *rest, *ends]
    rows = rows.reshape([known[name] for name in have])
    flat = [name for group in names for name in group]
    rows = rows.transpose([have.index(name) for name in flat])
    return rows.reshape([math.prod(known[name] for name in group) for group in names])
