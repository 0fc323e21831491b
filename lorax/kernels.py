"""How a program uses its parameters, found by an abstract run of the walker."""

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

    It can also be a kernel that the program computes from leaves, by decoding a
    quantised model or under a `checkpoint_name`: factors are added beside it just as
    beside a leaf.

    Attributes:
      path: the leaf's path.
      shape: the kernel's shape; if each step of a loop computes one, the steps come
        first.
      dtype: the kernel's dtype.
      op: the first linear use, as `KernelUse` names it; else "other" (used only by
        operations that are not linear in it) or "unused".
      axes: in, out and batch axes of the first linear use; None without one.
      flops: operations of all uses of the frozen leaf, in one call of the program.
      uses: every use, in program order.
      head: True for the last kernel before the output (an output head).
      value: the leaf itself, given to inits only. A quantised leaf is decoded by
        `jnp.asarray`; for a kernel that the program computes, its shape and dtype.
      leaves: the leaves from which the program computes the kernel; () where the leaf
        itself is the kernel. The path is then that of the codes, or a name.
      stored: shape and dtype of the codes; None if there are none.
      refused: why no factors can be added beside a computed kernel; "" if they can.
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
        """Returns `axes`; raises ValueError if no linear operation uses the leaf."""
        if self.axes is None:
            raise ValueError(
                f"{self.path}: no linear operation uses the leaf (op={self.op!r}), so "
                "low-rank factors do not apply; use adapter='full'"
            )
        return self.axes

    @property
    def matrix(self) -> bool:
        """True for a leaf with two axes longer than one that is used as a matrix."""
        sized = sum(size > 1 for size in self.shape) > 1
        return sized and (not self.uses or any(use.matrix for use in self.uses))

    @property
    def tied(self) -> bool:
        """True if one use reads what another writes (an embedding and its head)."""
        if self.axes is None:
            return False
        return any(use.axes == _orientations(self.axes)[1] for use in self.uses)

    @property
    def conflicts(self) -> tuple[KernelUse, ...]:
        """Linear uses that factors made for `axes` cannot serve, even transposed."""
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
    """Reports how `fn` uses every kernel, without running it.

    Kernels are the floating leaves of `params`, and kernels that `fn` computes from
    parameters alone: those it decodes from integers or 8-bit floats (by a scale, a zero
    point, a table, packed halves), and those it names with
    `jax.ad_checkpoint.checkpoint_name`.

    Args:
      fn: a pure function of a parameter tree, as given to `adapt`.
      params: its parameters; arrays or `ShapeDtypeStruct`s.
      *args: its other arguments; arrays, `ShapeDtypeStruct`s or anything static.
      **kwargs: as `*args`.

    Returns:
      `{path: Kernel}` for every floating leaf, for the codes of every kernel that `fn`
      decodes, and for every named kernel.

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

    These are recognised by what they depend on, so all arrays have to be inputs. A
    function that reads an array's value is traced with its floating leaves alone, so
    kernels that it decodes from codes are not found.
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
