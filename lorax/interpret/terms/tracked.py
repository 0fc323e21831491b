"""A value that is a view of adapted leaves, and the low-rank terms that travel with it.

Inside the walker a kernel is not an array but a `Tracked`: the frozen array as the
program sees it (transposed, sliced, reshaped, cast), plus one `Term` for every leaf in
it. A term knows which leaf axes each dimension of the view stands for, where its block
is, and (under `adapt`, not under `discover`) the factors, in one canonical order:

    a: [*batch, *in, rank]     b: [*batch, rank, *out]     gain: [*batch, *out]

with the dimensions of each kind in view order. Every view is then an edit of labels,
plus the same edit of the factor that owns the dimension.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from lorax import _explicit
from lorax.interpret.terms.coded import Coded
from lorax.quantized import Quantized
from lorax.types import Axes, Factors

Labels = tuple[tuple[int, ...], ...]


class Rigid(Exception):
    """A view that cuts or flips an axis on which a map acts as a whole."""


Scope = tuple[core.JaxprEqn, ...]
"""The equations that enclose a place in a program, the outermost first."""


class Lookup(NamedTuple):
    """A gather that is an embedding lookup unless its result is contracted further.

    Attributes:
      axes: of the leaf, if it is a lookup.
      place: of the gather: the equations around it and its own.
      source: `file:line (function)`.
    """

    axes: Axes
    place: Scope
    source: str


_FIELDS = (
    "path leaf labels start shape indexed axes rate lookup scaled peers behind"
).split()


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["factors"], meta_fields=_FIELDS
)
@dataclasses.dataclass(frozen=True)
class Term:
    """One leaf inside a view.

    Attributes:
      path: the leaf's path.
      leaf: the leaf's shape.
      labels: for each dimension of the view, the leaf axes it stands for; () for one
        that the program added: of length one, or a stack of kernels in its own right
        (kernels taken by index, repeated, or stacked), which both factors have.
      start: for each dimension, where the leaf's block begins (not 0 after a concat).
      shape: the block's shape.
      indexed: leaf axes taken away by indexing or scanning over them.
      axes: the adapter's axes; None under discover.
      rate: dropout on the adapter branch.
      factors: `a: [*batch, *in, rank]`, `b: [*batch, rank, *out]` and, where the
        adapter rescales the frozen kernel, `gain: [*batch, *out]`, in view order; None
        under discover.
      lookup: under discover, the gather that this is the result of, until it is known
        how the result is used.
      scaled: under discover, leaf axes along which one array has scaled the kernel:
        apart from the batch, they must all be in, or all be out.
      peers: the other leaves of a stack that the program made.
      behind: True if a scale after the product is part of the kernel, so that the
        factors do not fit what the view holds.
    """

    path: str
    leaf: tuple[int, ...]
    labels: Labels
    start: tuple[int, ...]
    shape: tuple[int, ...]
    indexed: frozenset[int] = frozenset()
    axes: Axes | None = None
    rate: float = 0.0
    factors: Factors | None = None
    lookup: Lookup | None = None
    scaled: tuple[frozenset[int], ...] = ()
    peers: tuple[str, ...] = ()
    behind: bool = False

    def sized(self, axes: Iterable[int]) -> frozenset[int]:
        """The leaf axes among `axes` that are longer than one."""
        return frozenset(axis for axis in axes if self.leaf[axis] > 1)

    def kind(self, dim: int) -> str | None:
        """Returns "in", "out", "batch"; "unit" for an inserted axis; None if mixed."""
        label = self.labels[dim]
        if self.axes is None:
            return "unit"
        if not label:
            return "batch" if self.added(dim) else "unit"
        wanted = self.sized(label) or frozenset(label)
        groups = zip(("in", "out", "batch"), self.axes, strict=True)
        return next((kind for kind, group in groups if wanted <= {*group}), None)

    def added(self, dim: int) -> bool:
        """True for a stack that the program made: longer than one, of no leaf axis."""
        return not self.labels[dim] and self.shape[dim] > 1

    def dims(self, kind: str) -> list[int]:
        """The dimensions of the view of one kind, in view order."""
        return [d for d in range(len(self.labels)) if self.kind(d) == kind]

    def whole(self, dim: int, shape: Sequence[int]) -> bool:
        """True when the block fills this dimension of a view of the given shape."""
        return self.start[dim] == 0 and self.shape[dim] == shape[dim]

    def edit(
        self,
        dim: int,
        change: Callable[[jax.Array, int], jax.Array],
        *,
        start: tuple[int, ...] | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> Term:
        """Applies `change(factor, axis)` to the factors that own a dimension.

        Args:
          dim: of the view.
          change: returns the new factor.
          start: of the new term; None: as before.
          shape: likewise.
        """
        factors, kind = self.factors, self.kind(dim)
        if factors is not None and kind in ("batch", "in", "out"):
            if kind in factors.rigid:
                raise Rigid
            a, b, gain, *held = factors
            axis, n = self.dims(kind).index(dim), len(self.dims("batch"))
            if kind != "out":
                a = change(a, axis + (kind == "in") * n)
            if kind != "in":
                b = change(b, axis + (kind == "out") * (n + 1))
            if kind != "in" and gain is not None:
                gain = change(gain, axis + (kind == "out") * n)
            if kind == "batch":
                held = jax.tree.map(lambda f: change(f, axis), held)
            factors = Factors(a, b, gain, *held)
        start = self.start if start is None else start
        shape = self.shape if shape is None else shape
        new = dataclasses.replace(self, factors=factors, start=start, shape=shape)
        if factors is None or kind != "batch" or new.kind(dim) == "batch":
            return new
        # one kernel is left of a stack in its own right, and no axis numbers it
        squeezed = jax.tree.map(lambda f: jnp.squeeze(f, axis), factors)
        return dataclasses.replace(new, factors=squeezed)

    @property
    def gained(self) -> bool:
        """True for a term that rescales the kernel's outputs."""
        return self.factors is not None and self.factors.gain is not None

    @property
    def turns(self) -> bool:
        """True for a term whose map turns the kernel's inputs."""
        return self.factors is not None and self.factors.inputs is not None

    def drop(self, dim: int) -> Term:
        """Takes an indexed dimension out of the view; factors already lost theirs."""
        cut = lambda t: t[:dim] + t[dim + 1 :]
        return dataclasses.replace(
            self,
            labels=cut(self.labels),
            start=cut(self.start),
            shape=cut(self.shape),
            indexed=self.indexed | frozenset(self.labels[dim]),
        )


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["value", "terms"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Tracked:
    """A view of leaves: the frozen array, and what adapters add to it.

    Without terms it is a quantised leaf that has no adapter.
    """

    value: jax.Array | Coded
    terms: tuple[Term, ...]

    @property
    def array(self) -> jax.Array:
        """The frozen array; a quantised leaf is decoded here."""
        return self.value.array() if isinstance(self.value, Coded) else self.value

    @property
    def kind(self) -> jax.Array | jax.ShapeDtypeStruct:
        """What the program is traced with in place of the view."""
        if not isinstance(self.value, Coded):
            return self.value
        if not _explicit.is_explicit(*jax.tree.leaves(self.value)):
            return jax.ShapeDtypeStruct(self.value.shape, self.value.dtype)
        return jax.eval_shape(self.value.array)

    @property
    def lies(self) -> list[Any]:
        """For each dimension, the axes of an Explicit mesh that shard it."""
        return _explicit.entries(self.kind)

    @property
    def paths(self) -> tuple[str, ...]:
        """The leaves in this view."""
        adapted = (path for term in self.terms for path in (term.path, *term.peers))
        packed = self.value.paths if isinstance(self.value, Coded) else ()
        return tuple(dict.fromkeys((*adapted, *packed)))

    @property
    def looked_up(self) -> bool:
        """True for the result of a gather that may be an embedding lookup."""
        return any(term.lookup is not None for term in self.terms)

    def gained_by(self, dim: int) -> bool:
        """True if a dimension numbers kernels with gains of their own."""
        return any(
            term.gained and term.shape[dim] > 1 and term.kind(dim) == "batch"
            for term in self.terms
        )

    def adapted(self, factors: Factors, axes: Axes, rate: float = 0.0) -> Tracked:
        """Gives a watched leaf an adapter's factors, laid out by its axes."""
        (term,) = self.terms
        in_, out, batch = axes
        a, b, gain, *held = factors
        if gain is not None:  # ordered as b is, whose rank is axis len(batch)
            gain = jnp.expand_dims(gain, len(batch))
            gain = _in_view_order(gain, batch, out, 1).squeeze(len(batch))
        a, b = _in_view_order(a, batch, in_, 0), _in_view_order(b, batch, out, 1)
        stack = [batch.index(axis) for axis in sorted(batch)]
        own = lambda f: f.transpose(*stack, *range(len(stack), f.ndim))
        held = jax.tree.map(own, held)  # their own axes are the adapter's, flattened
        term = dataclasses.replace(
            term,
            axes=axes,
            rate=rate,
            factors=Factors(a, b, gain, *held),
        )
        return followed(Tracked(self.value, (term,)))


def _in_view_order(
    factor: jax.Array, batch: Sequence[int], own: Sequence[int], gap: int
) -> jax.Array:
    """Permutes a factor laid out by an adapter's axes to the leaf's own order.

    `gap` is 1 if the rank is between batch and own axes, 0 if it is last.
    """
    n = len(batch)
    ranks = lambda axes: [axes.index(axis) for axis in sorted(axes)]
    own_order = [n + gap + i for i in ranks(own)]
    rank = [n] if gap else [factor.ndim - 1]
    tail = rank + own_order if gap else own_order + rank
    return factor.transpose(ranks(batch) + tail)


def followed(view: Tracked) -> Tracked:
    """Returns a view whose factors are sharded on an Explicit mesh as its dimensions.

    The rank stays whole, and so does a dimension of which a term has only a block.
    """
    shape = view.value.shape

    def settled(term: Term) -> Term:
        if term.factors is None:
            return term
        batch, in_, out = (
            [lies[d] if term.whole(d, shape) else None for d in term.dims(kind)]
            for kind in ("batch", "in", "out")
        )
        a, b, gain, *held = term.factors
        a = _explicit.moved(a, [*batch, *in_, None], beside)
        b = _explicit.moved(b, [*batch, None, *out], beside)
        if gain is not None:
            gain = _explicit.moved(gain, [*batch, *out], beside)
        whole = lambda f: [*batch, *[None] * (f.ndim - len(batch))]
        held = jax.tree.map(lambda f: _explicit.moved(f, whole(f), beside), held)
        return dataclasses.replace(term, factors=Factors(a, b, gain, *held))

    if not _explicit.is_explicit(*jax.tree.leaves(view)):
        return view
    lies, beside = view.lies, jax.tree.leaves(view.value)[0]
    return Tracked(view.value, tuple(map(settled, view.terms)))


def watch(path: str, leaf: jax.Array | jax.ShapeDtypeStruct | Quantized) -> Tracked:
    """Returns a whole leaf as a view of itself, without factors (for discover)."""
    shape = tuple(leaf.shape)
    labels = tuple((axis,) for axis in range(len(shape)))
    term = Term(path, shape, labels, (0,) * len(shape), shape)
    return dataclasses.replace(unadapted(path, leaf), terms=(term,))


def unadapted(path: str, leaf: Any) -> Tracked:
    """Returns a whole leaf as a view to which nothing is added."""
    return Tracked(Coded.of(leaf, path) if isinstance(leaf, Quantized) else leaf, ())
