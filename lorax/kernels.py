"""How a program uses its parameters: the abstract run of the walker."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lorax import _explicit, interpret, tree
from lorax.interpret import KernelUse
from lorax.types import Axes, PyTree


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A leaf of the parameter tree and how the program uses it.

    Or a kernel that the program computes of leaves, by its own code for quantised
    models or under a name of `checkpoint_name`: beside it factors go as beside a leaf.

    Attributes:
      path: the leaf's path.
      shape: the kernel's shape; steps of a loop that compute one each are in front.
      dtype: the kernel's dtype.
      op: the first linear use, as `KernelUse` names it; else "other"
        (met by something that is not linear in it) or "unused".
      axes: in, out and batch axes of the first linear use; None without one.
      flops: of one call of the program, on the frozen leaf, all uses together.
      uses: every use, in program order.
      head: True for the last kernel on its way to the output (an output head).
      value: the leaf itself; given to inits only. A quantised one is decoded by
        `jnp.asarray`; of a kernel that the program computes it is the shape and dtype.
      leaves: those that the program computes the kernel of; () where the leaf itself is
        the kernel. The path is that of its codes, or a name.
      stored: shape and dtype of the codes; None where there are none.
      refused: why no factors can go beside a computed kernel; "" where they can.
    """

    path: str
    shape: tuple[int, ...]
    dtype: jnp.dtype
    op: str
    axes: Axes | None
    flops: int = 0
    uses: tuple[KernelUse, ...] = ()
    head: bool = False
    value: Any = None
    leaves: tuple[str, ...] = ()
    stored: jax.ShapeDtypeStruct | None = None
    refused: str = ""

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


def discover(
    fn: Callable[..., Any], params: PyTree, *args: Any, **kwargs: Any
) -> dict[str, Kernel]:
    """Reports how `fn` uses every kernel, without computing.

    Kernels are the floating leaves of `params`, and what `fn` makes of parameters
    alone: of integers and floats of 8 bits, by code of its own (a scale, a zero point,
    a table, packed halves), and what it names by `jax.ad_checkpoint.checkpoint_name`.

    Args:
      fn: a pure function of a parameter tree, as given to `adapt`.
      params: its parameters; arrays or `ShapeDtypeStruct`s.
      *args: its other arguments; arrays, `ShapeDtypeStruct`s or anything static.
      **kwargs: likewise.

    Returns:
      `{path: Kernel}` for every floating leaf, for the codes of every kernel that `fn`
      decodes, and for every named one.

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
    tree.require_pure(params)
    leaves = tree.flatten(params)
    program, plan = _planned(fn, params, leaves, (args, kwargs))
    floating = {path for path, leaf in leaves.items() if tree.is_floating(leaf)}
    watched = floating - plan.kernels.keys()
    terms = {
        path: dataclasses.replace(term, behind=path in plan.behind)
        for path, kind in plan.kernels.items()
        for term in interpret.watch(path, kind).terms
    }
    recorder = interpret.Recorder()
    walker = interpret.Walker(recorder, plan=dataclasses.replace(plan, terms=terms))

    def walk(both: Any) -> list[jax.Array]:
        own, rest = both
        views = [
            interpret.watch(path, leaf) if path in watched else leaf
            for path, leaf in own.items()
        ]
        return recorder.returned(walker.run(program.jaxpr, [*views, *rest]))

    given = {path: interpret.as_leaf(leaves[path]) for path in program.paths}
    jax.eval_shape(walk, (given, program.rest))
    inner = interpret.not_last(program.jaxpr, recorder.equations)
    uses = recorder.uses
    found = {
        path: _describe(path, leaves[path], uses.get(path, {}), inner)
        for path in leaves
        if path in watched
    }
    for path, kind in plan.kernels.items():
        kernel = _describe(path, kind, uses.get(path, {}), inner)
        found[path] = _computed(kernel, leaves.get(path), plan)
    for path in watched & plan.refused.keys():
        if not tree.is_coded(leaves[path]):
            reason = plan.refused[path]
            found[path] = dataclasses.replace(found[path], refused=reason)
    parts = {part for path in plan.kernels for part in plan.leaves[path]}
    for path in parts & found.keys() - plan.kernels.keys():
        if found[path].axes is None:
            found[path] = dataclasses.replace(found[path], op="decoding")
    order = [*leaves, *sorted(plan.kernels)]
    return {path: found[path] for path in dict.fromkeys(order) if path in found}


def _planned(
    fn: Callable[..., Any],
    params: PyTree,
    leaves: Mapping[str, Any],
    arguments: tuple[Any, Any],
) -> tuple[interpret.Program, interpret.Plan]:
    """The program, and the kernels that it computes.

    Those are told by what they are made of, so that all arrays have to be inputs; a
    function that reads the value of one is traced with its floating leaves alone, and
    computes none that factors could go beside.
    """
    kinds = {
        path: _explicit.abstract(
            interpret.unadapted(path, interpret.as_leaf(leaf)).kind
        )
        for path, leaf in leaves.items()
        if tree.is_floating(leaf) or tree.is_coded(leaf)
    }
    try:
        program = interpret.traced(fn, params, kinds, arguments, whole=True)
    except interpret.NEEDS_VALUES:
        kinds = {p: kind for p, kind in kinds.items() if tree.is_floating(kind)}
        program = interpret.traced(fn, params, kinds, arguments, whole=False)
    return program, interpret.plan_of(program, leaves)


def _computed(kernel: Kernel, leaf: Any, plan: interpret.Plan) -> Kernel:
    """The description of a kernel that the program computes."""
    stored = None
    if leaf is not None:
        stored = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return dataclasses.replace(
        kernel,
        op=kernel.op if kernel.axes is not None else "other",
        stored=stored,
        leaves=plan.leaves[kernel.path],
        refused=plan.refused.get(kernel.path, ""),
    )


def _describe(
    path: str, leaf: Any, uses: Mapping[Any, KernelUse], inner: set[str]
) -> Kernel:
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
