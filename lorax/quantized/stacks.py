"""Work on a stack of quantised kernels of which one at a time is dense."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lorax.quantized.leaf import Quantized


def map_kernels(run: Callable[..., Any], leaf: Quantized, *arrays: Any) -> Any:
    """Returns `run(kernel, axes, *arrays)` of every kernel of a stack, stacked.

    The kernels are decoded one after the other, in the backward pass once more.

    Args:
      run: given one dense kernel, its axes (none of them stacked) and what `arrays`
        have for it.
      leaf: of any number of stacked axes; without one `run` is called once.
      *arrays: trees of arrays whose leading axes are the stacked ones.
    """

    def one(leaf: Quantized, *own: Any) -> Any:
        return run(jnp.asarray(leaf), leaf.axes, *own)

    if not leaf.axes.batch:
        return jax.checkpoint(one)(leaf, *arrays)
    inner = leaf.inner_axes

    def layer(parts: tuple[Any, ...]) -> Any:
        cut, *own = parts
        return map_kernels(run, dataclasses.replace(cut, axes=inner), *own)

    return jax.lax.map(layer, (leaf, *arrays))


def chosen(leaf: Quantized, layers: Sequence[int]) -> Quantized:
    """Returns some kernels along the first stacked axis."""
    return jax.tree.map(lambda array: array[jnp.asarray(layers)], leaf)
