"""Selects the adapters with a low-rank update, with what they need from the base."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lorax import tree
from lorax.adapters import as_lora, bound, pairs
from lorax.types import Adapters, Factors, PyTree


def chosen(adapters: Adapters, what: str) -> Adapters:
    """Returns the adapters that have factors.

    Raises:
      ValueError: no adapter has factors.
    """
    found = {
        path: adapter
        for path, adapter in adapters.items()
        if pairs.is_pair(adapter) or adapter.as_lora() is not None
    }
    if not found:
        names = sorted({type(adapter).__name__ for adapter in adapters.values()})
        raise ValueError(
            f"{what} reads low-rank factors, but was given "
            f"{', '.join(names) or 'an empty tree'}; pass the dict that lorax.init "
            "returns for at least one lora, dora or adalora target"
        )
    return found


def on_leaves(
    adapters: Adapters, params: PyTree
) -> tuple[Adapters, dict[str, jax.Array]]:
    """Returns the adapters with their frozen arrays, and their leaves, by path.

    Raises:
      KeyError: a path that params lacks.
      ValueError: an adapter that does not fit its leaf.
    """
    leaves, (_, frozen) = tree.flatten(params), tree.split(params)
    tree.require(adapters, leaves, "parameter tree")
    for path, adapter in adapters.items():
        adapter.check(path, leaves[path])
    whole = {path: bound(a, frozen, path) for path, a in adapters.items()}
    return whole, {path: jnp.asarray(leaves[path]) for path in adapters}


def factors(adapter: Any, leaf: jax.Array) -> Factors:
    """Returns the whole update as thin factors, except for a gain.

    The factors of a form with maps hold only a part of it; the Lora form has all.
    """
    form = adapter.factors(leaf)
    whole = form is not None and not form.maps
    return form if whole else as_lora(adapter).factors(leaf)


def product(adapter: Any) -> pairs.Both:
    """Returns an update's factors: `pairs.matrices` with the scale folded into b."""
    plain = as_lora(adapter)
    a, b = pairs.matrices(plain)
    return pairs.Both(a, plain.scale * b)
