"""A base that repeats layers of another: PEFT's `layer_replication`.

    config, params = peft.replicate_layers(config, params, [[0, 4], [2, 5]])

makes layers 0 1 2 3 2 3 4. In PEFT the repeated layers share weights but have factors
of their own; here their weights are copies, which stay frozen, so the function is the
same. SOLAR's "depth up-scaling" works this way.

References:
  Kim et al., SOLAR 10.7B, arXiv:2312.15166.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from lorax.types import PyTree

Ranges = Iterable[Sequence[int]]


def replicate_layers(config: Any, params: PyTree, ranges: Ranges) -> tuple[Any, PyTree]:
    """Returns the config and the parameters of the replicated model.

    Args:
      config: `model.config`, of a family with one stack of layers.
      params: the model's parameters.
      ranges: pairs (from, to) of layers, `to` excluded.

    Returns:
      The config with the new number of layers, and parameters with copied layers.

    Raises:
      ValueError: the model has two stacks (T5), or lacks a layer.

    Example:
      >>> from lorax.models import llama
      >>> config = llama.Config(31, 64, 16, 2, 4, 2, 4, 24)
      >>> taken, _ = replicate_layers(config, {}, [(0, 2), (1, 2)])
      >>> taken.layers
      3
    """
    stack, depth = _stack(config)
    layers = numbers(ranges)
    if not layers or min(layers) < 0 or max(layers) >= depth:
        raise ValueError(
            f"ranges={ranges} select layers {layers}, but the model has {depth}"
        )
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    found: dict[str, Any] = {}
    for path, leaf in flat.items():
        head, _, rest = path.partition("/")
        if head == stack:
            found[path] = jax.tree.map(
                lambda x: jnp.take(x, jnp.array(layers), 0), leaf
            )
        elif not head.startswith(f"{stack}_"):
            found[path] = leaf
        for new in (i for i, old in enumerate(layers) if head == f"{stack}_{old}"):
            found[f"{stack}_{new}/{rest}"] = leaf
    whole = flax.traverse_util.unflatten_dict(found, sep="/")
    return dataclasses.replace(config, layers=len(layers)), whole


def numbers(ranges: Ranges) -> list[int]:
    """Returns the layers of the original that the ranges select, in order."""
    return [layer for start, end in ranges for layer in range(start, end)]


def require(ranges: Ranges, config: Any, leaves: Mapping[str, Any]) -> None:
    """Raises ValueError unless a base is what `layer_replication` describes.

    Args:
      ranges: the field; () for none.
      config: the base's config.
      leaves: the base's leaves by path; empty if they are not known.
    """
    if not (layers := numbers(ranges)):
        return
    stack, depth = _stack(config)
    wrong = (
        f"layer_replication={[list(pair) for pair in ranges]} makes a model with "
        f"{len(layers)} layers from another's"
    )
    make = "make it with peft.replicate_layers(config, params, layer_replication)"
    if depth != len(layers):
        raise ValueError(f"{wrong}, but this base has {depth}; {make}")
    for path, leaf in leaves.items():
        if path.partition("/")[0] == stack:
            for new, old in enumerate(layers):
                first = layers.index(old)
                if not all(
                    np.array_equal(x[new], x[first]) for x in jax.tree.leaves(leaf)
                ):
                    raise ValueError(
                        f"{wrong}, in which layers {first} and {new} are equal, but "
                        f"here {path!r} differs between them; {make}"
                    )


def _stack(config: Any) -> tuple[str, int]:
    """The name of the one stack of layers, and its depth."""
    stacks = config.stacks
    if len(stacks) > 1:
        raise ValueError(
            f"the model has the stacks {sorted(stacks)}, but layer_replication "
            "supports only one"
        )
    return next(iter(stacks.items()))
