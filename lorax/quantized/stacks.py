"""Operations on a stack of quantised kernels, only one of which is dense at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lorax.quantized.leaf import Quantized


def map_kernels(run: Callable[..., Any], leaf: Quantized, *arrays: Any) -> Any:
    """Returns `run(kernel, axes, *arrays)` for every kernel of a stack, stacked.

    The kernels are decoded one at a time, and again in the backward pass.

    Args:
      run: takes one dense kernel, its axes (none of them stacked) and that kernel's
        part of `arrays`.
      leaf: with any number of stacked axes; with none, `run` is called once.
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
    """Returns the kernels at `layers` of the first stacked axis."""
    return jax.tree.map(lambda array: array[jnp.asarray(layers)], leaf)
