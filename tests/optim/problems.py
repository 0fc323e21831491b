"""Shared by the optimisers' tests: tiny adapters of every shape, by hand."""

from __future__ import annotations

from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lorax.adapters import AdaLora, Dora, Full, Lora, Parametrisation
from lorax.types import Axes, Field

DENSE = Axes((0,), (1,))
# name -> (axes, shape of the leaf); batch axes first, then in, then out
LEAVES = {
    "dense": (DENSE, (6, 5)),
    "stacked": (Axes((1,), (2,), (0,)), (3, 4, 5)),
    "heads": (Axes((0,), (1, 2)), (4, 2, 3)),
    "conv": (Axes((0, 1), (2,)), (3, 2, 5)),
}


@flax.struct.dataclass
class Gated:
    """A parametrisation that declares roles but no fields."""

    b: jax.Array
    gate: jax.Array

    roles: ClassVar[dict[str, str]] = {"b": "b", "gate": "gate"}


@flax.struct.dataclass
class Own(Parametrisation):
    """A parametrisation with known roles whose a and b are not a pair."""

    a: jax.Array
    b: jax.Array

    fields = {"a": Field("a", "in rank"), "b": Field("b", "rank out")}


def draw(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    """Normal numbers from numpy, without compilation."""
    return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def lora(leaf: str = "dense", rank: int = 2, seed: int = 0, b: float = 1.0) -> Lora:
    """A Lora with random factors on one of LEAVES; `b` multiplies the second."""
    a_shape, b_shape = factor_shapes(leaf, rank)
    factors = draw(seed, *a_shape), b * draw(seed + 1, *b_shape)
    return Lora(*factors, scale=1.5, axes=LEAVES[leaf][0])


def dora(leaf: str = "dense", rank: int = 2, seed: int = 0) -> Dora:
    """A Dora on one of LEAVES with random arrays."""
    a_shape, b_shape = factor_shapes(leaf, rank)
    axes, shape = LEAVES[leaf]
    _, out, batch = axes.sizes(shape)
    drawn = draw(seed, *a_shape), draw(seed + 1, *b_shape), draw(seed + 2, *batch, *out)
    return Dora(*drawn, scale=1.5, axes=axes)


def adalora(leaf: str = "dense", rank: int = 2, seed: int = 0) -> AdaLora:
    """An AdaLora on one of LEAVES with random arrays."""
    a_shape, b_shape = factor_shapes(leaf, rank)
    axes, shape = LEAVES[leaf]
    lam = draw(seed + 2, *axes.sizes(shape)[2], rank)
    return AdaLora(draw(seed, *a_shape), lam, draw(seed + 1, *b_shape), 1.5, axes)


def full(size: int = 3, seed: int = 0) -> Full:
    """A bias trained whole."""
    return Full(draw(seed, size))


def factor_shapes(leaf: str, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a and b."""
    axes, shape = LEAVES[leaf]
    in_, out, batch = axes.sizes(shape)
    return (*batch, *in_, rank), (*batch, rank, *out)


def like(adapters: Any, seed: int = 100) -> Any:
    """Gradients: a random tree of the same shapes."""
    leaves, treedef = jax.tree.flatten(adapters)
    return treedef.unflatten(
        [draw(seed + i, *v.shape, dtype=v.dtype) for i, v in enumerate(leaves)]
    )
