"""How a program uses its parameters: the abstract run of the walker."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lorax import _explicit, interpret, tree
from lorax.interpret import trace
from lorax.types import Axes, PyTree


@dataclasses.dataclass(frozen=True)
class KernelUse:
    """One place where a program uses a leaf.

    Attributes:
      op: "dot", "conv", "grouped_conv", "depthwise_conv" (one input channel in each
        group), "gather", "ragged_dot", or the primitive that met the leaf.
      axes: how the leaf is read and written there; None unless the use is linear.
      fast: True where `adapt` emits the low-rank branch instead of merging.
      flops: of all runs of this place in one call, on the frozen leaf.
      source: `file:line (function)`.
      matrix: True where two axes or more of the leaf, longer than one, meet the
        operation: not so for one layer of a stack of biases.
    """

    op: str
    axes: Axes | None
    fast: bool
    flops: int
    source: str
    matrix: bool = True


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A leaf of the parameter tree and how the program uses it.

    Attributes:
      path: the leaf's path.
      shape: the leaf's shape.
      dtype: the leaf's dtype.
      op: the first linear use, as `KernelUse` names it; else "other"
        (met by something that is not linear in it) or "unused".
      axes: in, out and batch axes of the first linear use; None without one.
      flops: of one call of the program, on the frozen leaf, all uses together.
      uses: every use, in program order.
      head: True for the last kernel on its way to the output (an output head).
      value: the leaf itself; given to inits only.
    """

    path: str
    shape: tuple[int, ...]
    dtype: jnp.dtype
    op: str
    axes: Axes | None
    flops: int = 0
    uses: tuple[KernelUse, ...] = ()
    head: bool = False
    value: jax.Array | None = None

    def linear_axes(self) -> Axes:
        """Returns `axes`; ValueError where no linear operation uses the leaf."""
        if self.axes is None:
            raise ValueError(
                f"{self.path}: no linear operation uses the leaf (op={self.op!r}), so "
                "low-rank factors have no place; use adapter='full'"
            )
        return self.axes

    @property
    def matrix(self) -> bool:
        """True for a leaf with two axes longer than one, and met as such anywhere."""
        sized = sum(size > 1 for size in self.shape) > 1
        return sized and (not self.uses or any(use.matrix for use in self.uses))

    @property
    def tied(self) -> bool:
        """True when one use reads what another writes (an embedding and its head)."""
        if self.axes is None:
            return False
        return any(use.axes == _orientations(self.axes)[1] for use in self.uses)

    @property
    def conflicts(self) -> tuple[KernelUse, ...]:
        """Linear uses that factors made for `axes` do not serve, even transposed."""
        linear = (use for use in self.uses if use.axes is not None)
        return tuple(use for use in linear if not _served(use, self.axes))


def _orientations(axes: Axes) -> tuple[Axes, Axes]:
    """The two ways in which one pair of factors can be used: as made, transposed."""
    return axes, Axes(axes.out, axes.in_, axes.batch)


def _served(use: KernelUse, axes: Axes | None) -> bool:
    """True where factors made for `axes` have a low-rank form in this use."""
    if use.axes is None or axes is None:
        return False
    if use.axes in _orientations(axes):
        return True
    return use.op == "dot" and interpret.fits(use.axes, axes) is not None


class _Recorder:
    """The visitor that writes down what happens to every leaf."""

    def __init__(self) -> None:
        self.uses: dict[str, dict[Any, KernelUse]] = {}
        self.equations: dict[tuple[int, ...], set[str]] = {}

    def _note(self, walker: Any, eqn: Any, path: str, use: KernelUse) -> None:
        # a loop body may be traced more than once: count each place once
        place = (*walker.scope, id(eqn), path, use.op, use.axes)
        self.uses.setdefault(path, {})[place] = use

    def linear(self, walker: Any, use: interpret.Use) -> Any:
        eqn = use.eqn
        axes = [use.axes(term) for term in use.view.terms]
        if any(found is None for found in axes):
            return None
        for term, found in zip(use.view.terms, axes, strict=True):
            paths = (term.path, *term.peers)
            flops = use.flops * walker.trips // len(paths)
            note = KernelUse(use.op, found, use.low_rank, flops, walker.line(eqn))
            for path in paths:
                self._note(walker, eqn, path, note)
            place = (*walker.scope, id(eqn))
            self.equations.setdefault(place, set()).update(paths)
        return [interpret.frozen(walker, use)]

    def merge(self, walker: Any, eqn: Any, view: interpret.Tracked) -> jax.Array:
        for term in view.terms:
            sized = term.sized({axis for label in term.labels for axis in label})
            met = KernelUse(
                eqn.primitive.name, None, False, 0, walker.line(eqn), len(sized) > 1
            )
            if not self.settle(term):
                for path in (term.path, *term.peers):
                    self._note(walker, eqn, path, met)
        return view.value

    def custom(self, walker: Any, eqn: Any, paths: tuple[str, ...]) -> bool:
        return True

    def branches(self, walker: Any, use: Any) -> None:
        return None  # without factors there are none

    def settle(self, term: interpret.Term) -> bool:
        """Writes down a lookup that has turned out to be one; False if it is none."""
        if (found := term.lookup) is None:
            return False
        use = KernelUse("gather", found.axes, True, 0, found.source)
        place = (*found.place, term.path, use.op, use.axes)
        self.uses.setdefault(term.path, {})[place] = use
        self.equations.setdefault(found.place, set()).add(term.path)
        return True


def discover(
    fn: Callable[..., Any], params: PyTree, *args: Any, **kwargs: Any
) -> dict[str, Kernel]:
    """Reports how `fn` uses every floating leaf of `params`, without computing.

    Args:
      fn: a pure function of a parameter tree, as given to `adapt`.
      params: its parameters; arrays or `ShapeDtypeStruct`s.
      *args: its other arguments; arrays, `ShapeDtypeStruct`s or anything static.
      **kwargs: likewise.

    Returns:
      `{path: Kernel}` for every floating leaf.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"w": jnp.ones((4, 3)), "bias": jnp.ones(3)}
      >>> fn = lambda params, x: x @ params["w"] + params["bias"]
      >>> kernels = discover(fn, params, jax.ShapeDtypeStruct((2, 4), jnp.float32))
      >>> kernels["w"].op, kernels["w"].axes, kernels["w"].flops
      ('dot', Axes(in_=(0,), out=(1,), batch=()), 48)
      >>> kernels["bias"].op
      'other'
    """
    params, _ = tree.split(params)
    trace.require_pure(params)
    leaves = tree.flatten(params)
    watched = {
        path: trace.as_array(leaf)
        for path, leaf in leaves.items()
        if tree.is_floating(leaf)
    }
    others = tree.replace(params, dict.fromkeys(watched, 0.0))
    rest, join = trace.split_abstract((others, args, kwargs))

    def call(watched: dict[str, Any], values: list[Any]) -> Any:
        params, args, kwargs = join(values)
        return fn(tree.replace(params, watched), *args, **kwargs)

    abstract = jax.tree.map(_explicit.abstract, watched)
    jaxpr, _ = trace.trace(lambda both: call(*both), (abstract, rest))
    recorder = _Recorder()

    def walk(both: Any) -> list[Any]:
        watched, rest = both
        views = [interpret.watch(path, leaf) for path, leaf in sorted(watched.items())]
        outs = interpret.Walker(recorder).run(jaxpr, [*views, *rest])
        given = [out for out in outs if isinstance(out, interpret.Tracked)]
        for term in (term for out in given for term in out.terms):
            recorder.settle(term)
        return [
            out.value if isinstance(out, interpret.Tracked) else out for out in outs
        ]

    jax.eval_shape(walk, (abstract, rest))
    inner = _not_last(jaxpr, recorder.equations)
    return {
        path: _describe(path, leaves[path], recorder.uses.get(path, {}), inner)
        for path in watched
    }


def _describe(path: str, leaf: Any, uses: dict[Any, KernelUse], inner: set) -> Kernel:
    """Sums up the uses of one leaf."""
    linear = next((use for use in uses.values() if use.axes is not None), None)
    axes = linear.axes if linear else None
    places = tuple(
        dataclasses.replace(use, fast=use.fast and _served(use, axes))
        for use in uses.values()
    )
    return Kernel(
        path=path,
        shape=tuple(leaf.shape),
        dtype=jnp.dtype(leaf.dtype),
        op=linear.op if linear else ("other" if places else "unused"),
        axes=axes,
        flops=sum(use.flops for use in places),
        uses=places,
        head=linear is not None and path not in inner,
    )


def _not_last(jaxpr: Any, equations: dict[tuple[int, ...], set[str]]) -> set[str]:
    """Returns the kernels whose result some later kernel reads; the rest are heads.

    Every value carries its origin: the kernels it comes from since the last kernel.
    """
    inner: set[str] = set()
    none: frozenset[str] = frozenset()

    def flow(jaxpr: Any, given: list[frozenset[str]], scope: tuple) -> list:
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        if len(given) != len(jaxpr.invars):  # an unknown calling convention
            given = [none.union(*given)] * len(jaxpr.invars)
        origin = dict(zip(jaxpr.invars, given, strict=True))
        read = lambda atom: none if hasattr(atom, "val") else origin.get(atom, none)
        for eqn in jaxpr.eqns:
            sources = [read(v) for v in eqn.invars]
            carried = none.union(*sources)
            outs = [carried] * len(eqn.outvars)
            place = (*scope, id(eqn))
            if paths := equations.get(place):
                inner.update(carried)
                outs = [frozenset(paths)] * len(eqn.outvars)
            elif bodies := _bodies(eqn):
                outs = enter(eqn, bodies, sources, place)
            origin.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def enter(eqn: Any, bodies: list[Any], sources: list[Any], place: tuple) -> list:
        name, consts, carried = eqn.primitive.name, 0, 0
        if name == "cond":
            sources = sources[1:]
        elif name == "scan":
            consts, carried, _ = interpret.unchanged.scan_layout(eqn)
        elif name == "while":
            bodies = [eqn.params["body_jaxpr"]]
            sources = sources[eqn.params["cond_nconsts"] :]
            consts, carried = eqn.params["body_nconsts"], len(eqn.outvars)
        if carried:  # what one iteration hands to the next
            again = flow(bodies[0], sources, place)[:carried]
            for i, more in enumerate(again):
                sources[consts + i] |= more
        results = [flow(body, sources, place) for body in bodies]
        if any(len(result) != len(eqn.outvars) for result in results):
            # a kernel that writes to references returns nothing: all it read counts
            whole = none.union(*sources, *(o for r in results for o in r))
            return [whole] * len(eqn.outvars)
        return [none.union(*column) for column in zip(*results, strict=True)]

    flow(jaxpr, [none] * len(jaxpr.jaxpr.invars), ())
    return inner


def _bodies(eqn: Any) -> list[Any]:
    """The jaxprs among an equation's parameters."""
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else [value]:
            if hasattr(item, "eqns") or hasattr(item, "jaxpr"):
                found.append(item)
    return found
