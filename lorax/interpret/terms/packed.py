"""Views of quantised leaves that are leaves themselves, with rearranged packed arrays.

    w.T    w[i]    w[2:5]    jnp.stack([w1, w2])    for w in stack

Layers taken out of a stack, or put into one, stay packed until an operation reads them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from lorax.interpret.terms.coded import Coded
from lorax.quantized import Quantized
from lorax.types import Axes

Given = Sequence[Coded | jax.Array]
Edit = Callable[[Quantized], Quantized]

LAYERS = "squeeze slice dynamic_slice unstack split".split()
"""Operations that take layers out of a stack."""


def views(eqn: JaxprEqn, given: Given) -> list[Coded] | None:
    """Returns the results of a view of leaves; None where one needs a dense value."""
    name, first = eqn.primitive.name, given[0]
    if not isinstance(first, Coded):
        return None
    if name in ("stack", "concatenate"):
        return _joined(name, eqn.params, given)
    edits = _edits(eqn, first.shape, given[1:])
    if edits is None or (name in LAYERS and not first.stacked):
        return None
    found = [view for edit in edits if (view := _through(first, edit)) is not None]
    return found if len(found) == len(edits) else None


def _edits(eqn: JaxprEqn, shape: tuple[int, ...], rest: Given) -> list[Edit] | None:
    """For each result, how to make its leaf; None for what cannot stay packed."""
    params = eqn.params
    whole = lambda sizes: tuple(sizes[1:]) == shape[1:]
    match eqn.primitive.name:
        case "transpose":
            return [functools.partial(_transposed, order=params["permutation"])]
        case "broadcast_in_dim" | "reshape":
            made = cast(jax.core.ShapedArray, eqn.outvars[0].aval)
            return [_expanded] if made.shape == (1, *shape) else None
        case "squeeze" if tuple(params["dimensions"]) == (0,):
            return [functools.partial(Quantized.layer, index=0)]
        case "slice" if params["strides"] is None and whole(params["limit_indices"]):
            low, *others = params["start_indices"]
            high = params["limit_indices"][0]
            return None if any(others) else [functools.partial(_rows, at=(low, high))]
        case "dynamic_slice" if whole(params["slice_sizes"]):
            at, size = rest[0], params["slice_sizes"][0]
            return [functools.partial(_moving_rows, begin=at, size=size)]
        case "unstack" if params["axis"] == 0:
            return [
                functools.partial(Quantized.layer, index=i) for i in range(shape[0])
            ]
        case "split" if params["axis"] == 0:
            ends = itertools.pairwise([0, *itertools.accumulate(params["sizes"])])
            return [functools.partial(_rows, at=bounds) for bounds in ends]
    return None


def _through(view: Coded, edit: Edit) -> Coded | None:
    """Edits a leaf, or the one under views that treat its layers alike."""
    first = view.operands[0]
    if isinstance(first, Quantized):
        return view.of_leaf(edit(first))
    inner = _through(first, edit) if view.alike and isinstance(first, Coded) else None
    if inner is None:
        return None
    return dataclasses.replace(view, operands=(inner,), shape=inner.shape)


def _joined(name: str, params: dict[str, Any], given: Given) -> list[Coded] | None:
    """Concatenates stacks of leaves; None if their formats differ."""
    views = [view for view in given if isinstance(view, Coded)]
    leaves = [view.leaf for view in views if view.leaf is not None]
    if len(leaves) < len(given) or params["axis" if name == "stack" else "dimension"]:
        return None
    leaves = [*map(_expanded, leaves)] if name == "stack" else leaves
    forms = {jax.tree.structure(leaf) for leaf in leaves}
    shapes = {tuple(x.shape[1:] for x in jax.tree.leaves(leaf)) for leaf in leaves}
    if leaves[0].axes.batch[:1] != (0,) or len(forms) > 1 or len(shapes) > 1:
        return None
    whole = jax.tree.map(lambda *parts: jnp.concatenate(parts), *leaves)
    paths = dict.fromkeys(path for view in views for path in view.paths)
    return [Coded.of(whole, ", ".join(paths))]


def _transposed(leaf: Quantized, order: Sequence[int]) -> Quantized:
    """The leaf with its axes in another order, which moves no array."""
    axes = Axes(*(tuple(map(order.index, group)) for group in leaf.axes))
    return dataclasses.replace(leaf, axes=axes)


def _expanded(leaf: Quantized) -> Quantized:
    """The leaf as a stack of one."""
    in_, out, batch = (tuple(i + 1 for i in group) for group in leaf.axes)
    whole = dataclasses.replace(leaf, axes=Axes(in_, out, (0, *batch)))
    return jax.tree.map(lambda array: array[None], whole)


def _rows(leaf: Quantized, at: tuple[int, int]) -> Quantized:
    return jax.tree.map(lambda array: array[slice(*at)], leaf)


def _moving_rows(leaf: Quantized, begin: Any, size: int) -> Quantized:
    cut = lambda array: jax.lax.dynamic_slice_in_dim(array, begin, size)
    return jax.tree.map(cut, leaf)
