"""Axis names attached to the parameters: linen's boxes and nnx's variables."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.tree_util as jtu
from flax import nnx

from lorax import tree
from lorax.types import PyTree


class Named(NamedTuple):
    """The axis names that a box gives its leaf.

    Attributes:
      names: one for each dimension.
      logical: True if a table maps the names to mesh axes; False if they are mesh axes.
    """

    names: tuple[Any, ...]
    logical: bool


def names_of(params: PyTree) -> dict[str, Named]:
    """Returns the names in `nn.Partitioned` and `nn.LogicallyPartitioned`, by path.

    The metadata `out_sharding` of an `nnx.Variable` (`nnx.with_partitioning`) is read
    as mesh axes.

    Example:
      >>> import jax.numpy as jnp
      >>> box = nn.LogicallyPartitioned(jnp.ones((4, 6)), ("embed", "mlp"))
      >>> names_of({"up": {"kernel": box}})
      {'up/kernel': Named(names=('embed', 'mlp'), logical=True)}
    """
    plain, _ = tree.split(params)
    nodes = jtu.tree_flatten_with_path(plain, is_leaf=_is_box)[0]
    found = {tree.path_name(path): _named(node) for path, node in nodes}
    return {path: named for path, named in found.items() if named is not None}


def _is_box(node: Any) -> bool:
    return isinstance(node, nn.Partitioned | nnx.Variable)


def _named(node: Any) -> Named | None:
    if isinstance(node, nn.Partitioned):
        logical = isinstance(node, nn.LogicallyPartitioned)
        return Named(tuple(node.names), logical)
    if isinstance(node, nnx.Variable):
        names = node.get_metadata().get("out_sharding")
        if isinstance(names, tuple | jax.sharding.PartitionSpec):
            return Named(tuple(names), logical=False)
    return None
