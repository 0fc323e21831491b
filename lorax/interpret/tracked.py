"""A value that is a view of adapted leaves, and the low-rank terms that travel with it.

Inside the walker a kernel is not an array but a `Tracked`: the frozen array as the
program sees it (transposed, sliced, reshaped, cast), plus one `Term` for every leaf in
it. A term knows which leaf axes each dimension of the view stands for, where its block
lies, and (under `adapt`, not under `discover`) the factors, in one canonical order:

    a: [*batch, *in, rank]     b: [*batch, rank, *out]     gain: [*batch, *out]

with the dimensions of each kind in the order in which the view has them. Every view is
then an edit of labels, plus the same edit of the factor that owns the dimension.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorax import _explicit, linalg
from lorax.interpret import maps
from lorax.types import Axes, Factors

Labels = tuple[tuple[int, ...], ...]


class Rigid(Exception):
    """A view that cuts or flips an axis on which a map acts as a whole."""


class Lookup(NamedTuple):
    """A gather that is an embedding lookup unless its result is contracted further.

    Attributes:
      axes: of the leaf, if it is a lookup.
      place: of the gather: the equations around it and its own, by identity.
      source: `file:line (function)`.
    """

    axes: Axes
    place: tuple[int, ...]
    source: str


_FIELDS = "path leaf labels start shape indexed axes rate lookup scaled peers".split()


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
        that the program added: of length one, or a stack of kernels by its own right
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
        what becomes of it.
      scaled: under discover, leaf axes along which one array has scaled the kernel:
        they must all be in, or all be out, besides the batch.
      peers: the other leaves of a stack that the program made.
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
        self, dim: int, change: Callable[[jax.Array, int], jax.Array], **meta: Any
    ) -> Term:
        """Applies `change(factor, axis)` to the factors that own a dimension."""
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
        new = dataclasses.replace(self, factors=factors, **meta)
        if factors is None or kind != "batch" or new.kind(dim) == "batch":
            return new
        # of a stack by its own right one kernel is left, and no axis numbers it
        squeezed = jax.tree.map(lambda f: jnp.squeeze(f, axis), factors)
        return dataclasses.replace(new, factors=squeezed)

    def drop(self, dim: int) -> Term:
        """Takes an indexed dimension out of the view; the factors have lost theirs."""
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
    """A view of adapted leaves: the frozen array, and what the adapters add to it."""

    value: jax.Array
    terms: tuple[Term, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        """The leaves in this view."""
        return tuple(dict.fromkeys(p for t in self.terms for p in (t.path, *t.peers)))

    @property
    def looked_up(self) -> bool:
        """True for the result of a gather that may be an embedding lookup."""
        return any(term.lookup is not None for term in self.terms)

    def adapted(self, adapter: Any, factors: Factors) -> Tracked:
        """Gives a watched leaf the factors of its adapter."""
        (term,) = self.terms
        in_, out, batch = adapter.axes
        a, b, gain, *held = factors
        if gain is not None:  # ordered as b is, whose rank stands at len(batch)
            gain = jnp.expand_dims(gain, len(batch))
            gain = _in_view_order(gain, batch, out, 1).squeeze(len(batch))
        a, b = _in_view_order(a, batch, in_, 0), _in_view_order(b, batch, out, 1)
        stack = [batch.index(axis) for axis in sorted(batch)]
        own = lambda f: f.transpose(*stack, *range(len(stack), f.ndim))
        held = jax.tree.map(own, held)  # their own axes are the adapter's, flattened
        term = dataclasses.replace(
            term,
            axes=adapter.axes,
            rate=getattr(adapter, "dropout", 0.0),
            factors=Factors(a, b, gain, *held),
        )
        return followed(Tracked(self.value, (term,)))


def _in_view_order(
    factor: jax.Array, batch: Sequence[int], own: Sequence[int], gap: int
) -> jax.Array:
    """Permutes a factor laid out by an adapter's axes to the leaf's own order.

    `gap` is 1 where the rank stands between batch and own axes, 0 where it is last.
    """
    n = len(batch)
    ranks = lambda axes: [axes.index(axis) for axis in sorted(axes)]
    own_order = [n + gap + i for i in ranks(own)]
    rank = [n] if gap else [factor.ndim - 1]
    tail = rank + own_order if gap else own_order + rank
    return factor.transpose(ranks(batch) + tail)


def followed(view: Tracked) -> Tracked:
    """Returns a view whose factors lie on an Explicit mesh as its dimensions do.

    The rank is whole, and so is a dimension of which a term has only a block.
    """
    lies, shape = _explicit.entries(view.value), view.value.shape

    def settled(term: Term) -> Term:
        if term.factors is None:
            return term
        batch, in_, out = (
            [lies[d] if term.whole(d, shape) else None for d in term.dims(kind)]
            for kind in ("batch", "in", "out")
        )
        a, b, gain, *held = term.factors
        a = _explicit.moved(a, [*batch, *in_, None], view.value)
        b = _explicit.moved(b, [*batch, None, *out], view.value)
        if gain is not None:
            gain = _explicit.moved(gain, [*batch, *out], view.value)
        whole = lambda f: [*batch, *[None] * (f.ndim - len(batch))]
        held = jax.tree.map(lambda f: _explicit.moved(f, whole(f), view.value), held)
        return dataclasses.replace(term, factors=Factors(a, b, gain, *held))

    if not _explicit.is_explicit(*jax.tree.leaves(view)):
        return view
    return Tracked(view.value, tuple(map(settled, view.terms)))


def watch(path: str, leaf: jax.Array) -> Tracked:
    """Returns a whole leaf as a view of itself, without factors (for discover)."""
    shape = tuple(leaf.shape)
    labels = tuple((axis,) for axis in range(len(shape)))
    return Tracked(leaf, (Term(path, shape, labels, (0,) * len(shape), shape),))


def dense(tracked: Any) -> jax.Array:
    """Returns the merged view: float32 accumulation, one rounding; arrays pass."""
    if not isinstance(tracked, Tracked):
        return tracked
    dtype = linalg.wide(tracked.value.dtype)
    total, shape = tracked.value.astype(dtype), tracked.value.shape
    for term in tracked.terms:
        if term.factors is None:
            return tracked.value
        for part in maps.dense(term, tracked.value):
            total = total + _explicit.like(part, total)
        a, b = term.factors[:2]
        if not a.shape[-1]:
            continue
        batch, in_, out = (term.dims(kind) for kind in ("batch", "in", "out"))
        order, n = batch + in_ + out, len(batch)
        product = _explicit.dot(
            a.astype(dtype),
            b.astype(dtype),
            (((a.ndim - 1,), (n,)), (tuple(range(n)),) * 2),
            jax.lax.Precision.HIGHEST,
        ).transpose([order.index(d) for d in sorted(order)])
        units = [d for d in range(len(shape)) if d not in order]
        product = place(jnp.expand_dims(product, units), term.start, shape)
        total = total + _explicit.like(product, total)
    for term in tracked.terms:
        if (gain := gains(term, range(len(shape)), shape)) is not None:
            total = total * gain.astype(dtype)
    return total.astype(tracked.value.dtype)


def ungained(tracked: Tracked) -> Tracked:
    """Returns a view without the gains of its terms."""
    plain = []
    for term in tracked.terms:
        if term.factors is not None:
            term = dataclasses.replace(term, factors=term.factors._replace(gain=None))
        plain.append(term)
    return Tracked(tracked.value, tuple(plain))


def block_of(tracked: Tracked, dim: int, begin: jax.Array, size: int) -> Tracked:
    """Returns a block of a view along a dimension that every term fills."""
    cut = lambda v, axis: jax.lax.dynamic_slice_in_dim(v, begin, size, axis)
    put = lambda shape: (*shape[:dim], size, *shape[dim + 1 :])
    terms = (term.edit(dim, cut, shape=put(term.shape)) for term in tracked.terms)
    return Tracked(cut(tracked.value, dim), tuple(terms))


def gains(term: Term, dims: Iterable[int], shape: Sequence[int]) -> jax.Array | None:
    """Returns a term's gain along some dimensions of its view, ones outside its block.

    Args:
      term: None is returned where it has no gain.
      dims: dimensions of the view, its batch and out dimensions among them, in the
        order that the result shall have them.
      shape: of the view.
    """
    if term.factors is None or term.factors.gain is None:
        return None
    dims, own = list(dims), term.dims("batch") + term.dims("out")
    gain = term.factors.gain.transpose([own.index(d) for d in dims if d in own])
    gain = gain.reshape([term.shape[d] if d in own else 1 for d in dims])
    needed = [d in own or not term.whole(d, shape) for d in dims]
    full = [shape[d] if need else 1 for d, need in zip(dims, needed, strict=True)]
    block = [term.shape[d] if need else 1 for d, need in zip(dims, needed, strict=True)]
    start = [term.start[d] if need else 0 for d, need in zip(dims, needed, strict=True)]
    return place(jnp.broadcast_to(gain, block), start, full, fill=1.0)


def place(
    block: jax.Array, start: Sequence[int], shape: Sequence[int], fill: float = 0.0
) -> jax.Array:
    """Returns `block` at offset `start` in a constant of the given shape."""
    if block.shape == tuple(shape):
        return block
    padding = [
        (lo, full - lo - size, 0)
        for lo, size, full in zip(start, block.shape, shape, strict=True)
    ]
    return jax.lax.pad(block, jnp.full((), fill, block.dtype), padding)
