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
      value: the leaf itself; given to inits only. A quantised one is decoded by
        `jnp.asarray`.
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
    tree.require_pure(params)
    leaves = tree.flatten(params)
    watched = {
        path: interpret.unadapted(path, interpret.as_leaf(leaf)).kind
        for path, leaf in leaves.items()
        if tree.is_floating(leaf)
    }
    others = tree.replace(params, dict.fromkeys(watched, 0.0))
    rest, join = interpret.split_abstract((others, args, kwargs))

    def call(watched: dict[str, Any], values: list[Any]) -> Any:
        params, args, kwargs = join(values)
        return fn(tree.replace(params, watched), *args, **kwargs)

    abstract = jax.tree.map(_explicit.abstract, watched)
    jaxpr, _ = interpret.trace(lambda both: call(*both), (abstract, rest))
    recorder = interpret.Recorder()

    def walk(both: Any) -> list[jax.Array]:
        watched, rest = both
        views = [interpret.watch(path, leaf) for path, leaf in sorted(watched.items())]
        outs = interpret.Walker(recorder).run(jaxpr, [*views, *rest])
        return recorder.returned(outs)

    jax.eval_shape(walk, (abstract, rest))
    inner = interpret.not_last(jaxpr, recorder.equations)
    return {
        path: _describe(path, leaves[path], recorder.uses.get(path, {}), inner)
        for path in watched
    }


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
