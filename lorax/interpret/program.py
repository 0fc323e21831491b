"""From a Python function to the jaxpr that the walker reads, and back to its output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from lorax.quantized import Quantized
from lorax.types import PyTree

Abstract = jax.ShapeDtypeStruct


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


def split_abstract(
    tree: PyTree,
) -> tuple[list[Abstract], Callable[[list[jax.Array]], PyTree]]:
    """Splits the `ShapeDtypeStruct`s off a tree: they must be traced, not closed over.

    Returns:
      The abstract leaves, and `join(values)` that rebuilds the tree around values.
    """
    flat, structure = jax.tree.flatten(tree)
    abstract = [isinstance(x, Abstract) for x in flat]

    def join(values: list[jax.Array]) -> PyTree:
        values = list(values)
        merged = zip(abstract, flat, strict=True)
        return jax.tree.unflatten(
            structure, [values.pop(0) if a else x for a, x in merged]
        )

    return [x for a, x in zip(abstract, flat, strict=True) if a], join


def as_leaf(leaf: Any) -> Any:
    """Returns a leaf as something that can be watched."""
    return leaf if isinstance(leaf, Abstract | Quantized) else jnp.asarray(leaf)
