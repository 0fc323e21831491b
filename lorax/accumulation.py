"""Gradients of a large batch as weighted means over sequential microbatches.

With microbatch losses `l_i`, each a mean over `w_i` target tokens,

    loss = sum_i w_i l_i / sum_i w_i,    g = sum_i w_i grad(l_i) / sum_i w_i

summed in at least float32. The squared norms of the microbatches' gradients are kept as
well: compared with that of the mean, they measure how noisy the gradient is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lorax import linalg
from lorax.losses import Metrics
from lorax.types import Adapters, MicrobatchNorms, PyTree

Gradients = tuple[Metrics, PyTree, Adapters]
"""A batch's loss and metrics, its new model state, and its gradients."""


def accumulated(micro: Callable[..., Gradients], count: int) -> Callable[..., Any]:
    """Returns `micro` for a large batch: weighted means over `count` microbatches.

    Args:
      micro: `(state, batch, key, *known) -> Gradients`; all microbatches share
        `known`.
      count: number of microbatches, at least 2; row i of the batch goes to microbatch
        i % count.

    Returns:
      A function of the same arguments that returns `(Gradients, MicrobatchNorms)`.
    """

    def gradients(
        state: Any, batch: PyTree, key: Any, *known: Any
    ) -> tuple[Gradients, MicrobatchNorms]:
        def body(carry: Any, inputs: Any) -> tuple[Any, Any]:
            total, model_state = carry
            index, rows = inputs
            now = dataclasses.replace(state, model_state=model_state)
            own = jax.random.fold_in(key, index)
            values, model_state, grads = micro(now, rows, own, *known)
            weight = values.get("weight", 1.0)
            squared = optax.tree.norm(grads, squared=True)
            weighted = jax.tree.map(lambda g: _weighted(g, weight), grads)
            total = jax.tree.map(jnp.add, total, weighted)
            return (total, model_state), (values, squared)

        zeros = jax.tree.map(jnp.zeros_like, widen(state.adapters))
        rows = _split(batch, count)
        inputs = (jnp.arange(count), rows)
        carry, (values, squared) = jax.lax.scan(
            body, (zeros, state.model_state), inputs
        )
        weights = values.get("weight", jnp.ones(count))
        weighted = jax.tree.map(lambda v: jax.vmap(_weighted)(v, weights), values)
        means = jax.tree.map(lambda v: v.sum(0) / weights.sum(), weighted)
        if "weight" in values:
            means["weight"] = weights.sum()
        grads = jax.tree.map(lambda g: g / weights.sum(), carry[0])
        counts = weights > 0  # a microbatch without target tokens has no gradient
        norms = MicrobatchNorms(
            small=jnp.where(counts, squared, 0.0).sum()
            / counts.sum(dtype=squared.dtype),
            large=optax.tree.norm(grads, squared=True),
            small_batch=_rows(batch) // count,
            large_batch=_rows(batch),
        )
        return (means, carry[1], grads), norms

    return gradients


def widen(tree: PyTree) -> PyTree:
    """Returns the leaves in the dtype of their sums, at least float32."""
    return jax.tree.map(lambda x: jnp.asarray(x, linalg.wide(x)), tree)


def _weighted(value: jax.Array, weight: jax.Array | float) -> jax.Array:
    # Without target tokens the microbatch's mean may be 0/0, so it must not count.
    return jnp.where(weight > 0, weight * value, 0.0).astype(value.dtype)


def _split(batch: PyTree, count: int) -> PyTree:
    """Returns the batch as `[count, rows / count, ...]`; row i goes to i % count."""
    leaves = jax.tree_util.tree_flatten_with_path(batch)[0]
    shapes = [(jax.tree_util.keystr(path), jnp.shape(leaf)) for path, leaf in leaves]
    for name, shape in shapes:
        if not shape or shape[0] % count or shape[:1] != shapes[0][1][:1]:
            raise ValueError(
                f"batch{name} has shape {shape}; accumulate={count} needs every leaf "
                "to have the same leading batch size, a multiple of accumulate"
            )

    def rows(x: jax.Array) -> jax.Array:
        return jnp.reshape(x, (-1, count, *jnp.shape(x)[1:])).swapaxes(0, 1)

    return jax.tree.map(rows, batch)


def _rows(batch: PyTree) -> int:
    """The number of examples in a batch that `_split` has checked."""
    return jnp.shape(jax.tree.leaves(batch)[0])[0]
