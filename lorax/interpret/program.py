"""From a Python function to the jaxpr that the walker reads, and back to its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from lorax import tree
from lorax.quantized import Quantized
from lorax.types import PyTree

Abstract = jax.ShapeDtypeStruct

NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)
"""What JAX raises when a function reads the value of a traced array."""


def trace(
    function: Callable[[PyTree], PyTree], leaves: PyTree
) -> tuple[ClosedJaxpr, Callable[[list[jax.Array]], PyTree]]:
    """Traces `function(leaves)`, whatever it returns.

    Args:
      function: a pure function of one pytree; all else it uses is closed over.
      leaves: a pytree of arrays or `ShapeDtypeStruct`s.

    Returns:
      The closed jaxpr, whose inputs are the flattened leaves and whose outputs are the
      arrays in the result; and `rebuild(arrays)`, which puts arrays back among the
      outputs that are not arrays.
    """
    static: list[PyTree] = []  # of the outputs: treedef, non-arrays, which are arrays

    def arrays(leaves: PyTree) -> list[jax.Array]:
        flat, treedef = jax.tree.flatten(function(leaves))
        static[:] = [treedef, [None if isinstance(x, jax.Array) else x for x in flat]]
        static.append([isinstance(x, jax.Array) for x in flat])
        return [x for x in flat if isinstance(x, jax.Array)]

    jaxpr = jax.make_jaxpr(arrays)(leaves)

    def rebuild(outputs: list[jax.Array]) -> PyTree:
        treedef, others, is_array = static
        outputs = list(outputs)
        merged = zip(is_array, others, strict=True)
        return jax.tree.unflatten(
            treedef, [outputs.pop(0) if a else other for a, other in merged]
        )

    return jaxpr, rebuild


def split_off(
    tree: PyTree, chosen: Callable[[Any], bool]
) -> tuple[list[Any], Callable[[list[jax.Array]], PyTree]]:
    """Splits off the leaves of a tree that are to be traced, not closed over.

    Returns:
      The chosen leaves, and `join(values)`, which rebuilds the tree around values.
    """
    flat, structure = jax.tree.flatten(tree)
    off = [chosen(x) for x in flat]

    def join(values: list[jax.Array]) -> PyTree:
        values = list(values)
        merged = zip(off, flat, strict=True)
        return jax.tree.unflatten(
            structure, [values.pop(0) if a else x for a, x in merged]
        )

    return [x for a, x in zip(off, flat, strict=True) if a], join


def is_shape(leaf: Any) -> bool:
    """True for what must be traced, because it has no value."""
    return isinstance(leaf, Abstract)


def is_array(leaf: Any) -> bool:
    """True for what can be traced: shapes and arrays."""
    return isinstance(leaf, Abstract) or tree.is_array(leaf)


class Program(NamedTuple):
    """A function of parameters and arguments as a jaxpr.

    Attributes:
      jaxpr: its inputs are the leaves in the order of their paths, then the rest.
      rebuild: puts arrays back among the outputs that are not arrays.
      paths: of the leaves that are inputs.
      rest: the other inputs.
      whole: True if every array that the function was called with is an input.
    """

    jaxpr: ClosedJaxpr
    rebuild: Callable[[list[jax.Array]], PyTree]
    paths: list[str]
    rest: list[Any]
    whole: bool


def traced(
    fn: Callable[..., Any],
    params: PyTree,
    kinds: Mapping[str, Any],
    arguments: tuple[Any, Any],
    whole: bool,
) -> Program:
    """Traces `fn(params, *args, **kwargs)`.

    Args:
      fn: the function.
      params: the parameter tree.
      kinds: `{path: array or shape}`, the inputs in place of the leaves.
      arguments: args and kwargs.
      whole: make their arrays inputs too, not only shapes. A function that reads a
        value while it is traced then raises one of `NEEDS_VALUES`.
    """
    kinds = dict(sorted(kinds.items()))
    others, of_params = split_off(
        tree.replace(params, dict.fromkeys(kinds, 0.0)), is_shape
    )
    given, of_arguments = split_off(arguments, is_array if whole else is_shape)

    def call(inputs: tuple[list[jax.Array], list[jax.Array]]) -> Any:
        own, rest = inputs
        # new containers: nnx Variables may only be written in this trace
        plain = of_params(rest[: len(others)])
        args, kwargs = of_arguments(rest[len(others) :])
        return fn(
            tree.replace(plain, dict(zip(kinds, own, strict=True))), *args, **kwargs
        )

    rest = [*others, *given]
    jaxpr, rebuild = trace(call, ([*kinds.values()], rest))
    return Program(jaxpr, rebuild, [*kinds], rest, whole)


def as_leaf(leaf: Any) -> Any:
    """Returns a leaf as something that can be watched."""
    return leaf if isinstance(leaf, Abstract | Quantized) else jnp.asarray(leaf)
