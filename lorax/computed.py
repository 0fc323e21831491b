"""Adapters on kernels that a program computes, by decoding or under a checkpoint name.

The program is traced with every array as an input, so that the trace shows which values
depend on parameters alone; the walker then adds the factors there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from lorax import adapters as adapter_classes
from lorax import interpret, tree
from lorax.types import Adapter, Adapters, PyTree


class Apart(NamedTuple):
    """Adapters split by the kind of kernel they adapt.

    Attributes:
      leaves: adapters of leaves that are themselves kernels.
      computed: adapters of kernels computed from codes, or named by the program.
    """

    leaves: Adapters
    computed: Adapters


def parted(adapters: Any, params: PyTree) -> Apart:
    """Splits adapters; anything else stays with the leaves, to be refused later."""
    if not isinstance(adapters, Mapping):
        return Apart(adapters, {})
    known = tree.flatten(params)

    def computed(path: str, adapter: Any) -> bool:
        whole = path in known and not tree.is_coded(known[path])
        return hasattr(adapter, "factors") and not whole

    beside, leaves = tree.partition(dict(adapters), computed)
    return Apart(leaves, beside)


def require_leaves(adapters: Adapters, params: PyTree) -> None:
    """Raises for the first adapter, if any: no leaf could hold its update.

    Args:
      adapters: adapters of computed kernels.
      params: the parameter tree.

    Raises:
      KeyError: the path is not a leaf, but perhaps a name.
      ValueError: the leaf holds codes.
    """
    known = tree.flatten(params)
    for path in adapters:
        if path not in known:
            raise KeyError(
                f"the parameter tree has no leaf {path!r}; "
                f"{tree.nearest(path, known)}; a kernel that the program names with "
                "checkpoint_name has no leaf to merge into: serve it with lorax.adapt"
            )
        raise ValueError(
            f"{path}: the leaf is quantised ({known[path].dtype}), and its codes "
            "cannot hold an update; serve the model with lorax.adapt(fn)(adapters, "
            "params, ...), or dequantise it with the model's own code and merge into "
            "that"
        )


def traced(
    fn: Callable[..., Any],
    params: PyTree,
    inputs: Mapping[str, Any],
    arguments: tuple[Any, Any],
) -> interpret.Program:
    """Traces a function with all arrays as inputs, or fewer if it reads their values.

    Args:
      fn: the function.
      params: the parameter tree.
      inputs: the leaves that become inputs: arrays and views.
      arguments: args and kwargs.
    """
    kinds = {p: getattr(value, "kind", value) for p, value in inputs.items()}
    try:
        return interpret.traced(fn, params, kinds, arguments, whole=True)
    except interpret.NEEDS_VALUES:
        return interpret.traced(fn, params, kinds, arguments, whole=False)


def plan(
    program: interpret.Program,
    leaves: Mapping[str, Any],
    adapters: Adapters,
    frozen: Mapping[str, jax.Array],
) -> interpret.Plan:
    """Returns where the kernels are, and the factors to add beside them.

    Args:
      program: the program, traced with all leaves.
      leaves: the parameter tree's leaves, by path.
      adapters: adapters of computed kernels.
      frozen: the frozen arrays of the `Base`.

    Raises:
      KeyError: a path that is neither a leaf nor a name.
      ValueError: codes that no product reads as floats; an adapter that does not fit.
    """
    found = interpret.plan_of(program, leaves, adapters)
    terms = {}
    for path, adapter in adapters.items():
        if path not in leaves and path not in found.refused:
            tree.require([path], {**leaves, **found.kernels}, "parameter tree")
        _require_place(path, leaves.get(path), found)
        term = _term(path, adapter, found.kernels[path], frozen)
        terms[path] = dataclasses.replace(term, behind=path in found.behind)
    return dataclasses.replace(found, terms=terms)


def _require_place(path: str, leaf: Any, plan: interpret.Plan) -> None:
    """Raises ValueError for a kernel beside which no factors can be added."""
    if path in plan.refused:
        raise ValueError(f"{path}: {plan.refused[path]}")
    if path not in plan.kernels:
        raise ValueError(
            f"{path}: the leaf is quantised ({leaf.dtype}), and no linear operation "
            "reads a kernel that the program computes from it and other parameters "
            "alone; exclude it (exclude= of the target)"
        )


def _term(
    path: str, adapter: Adapter, kind: jax.ShapeDtypeStruct, frozen: Mapping[str, Any]
) -> interpret.Term:
    """The adapter's term beside a kernel of this shape and dtype."""
    known: Any = adapter_classes.bound(adapter, frozen, path)
    name = type(adapter).__name__
    if known.replaces or getattr(known, "reads_kernel", True):
        raise ValueError(
            f"{path}: {name} reads the values of the kernel, which the program "
            "computes only where it is used; use adapter='lora' or another whose "
            "update does not depend on the kernel"
        )
    known.check(path, kind)
    factors = known.factors(kind)
    if factors is None:
        raise ValueError(
            f"{path}: {name} has no form for a linear operation, and there is no leaf "
            "that it could be merged into; use adapter='lora'"
        )
    view = interpret.watch(path, kind)
    rate = getattr(known, "dropout", 0.0)
    (term,) = view.adapted(factors, known.axes, rate).terms
    return term
