"""A different adapter for every example of one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lorax import transform, tree
from lorax.adapters import bound
from lorax.compose import stacks
from lorax.types import Adapters, Axes, Factors, Field, PyTree


@flax.struct.dataclass
class _Made:
    """Precomputed factors: a DoRA's norm is computed once, not once per example."""

    made: Factors
    axes: Axes = flax.struct.field(pytree_node=False)
    dropout: float = flax.struct.field(pytree_node=False)

    fields: ClassVar[dict[str, Field]] = {}
    replaces: ClassVar[bool] = False

    def check(self, path: str, leaf: jax.Array) -> None:
        """Does nothing: the adapter was checked when its factors were computed."""

    def factors(self, kernel: jax.Array) -> Factors:
        """Returns them."""
        del kernel
        return self.made


def route(
    fn: Callable[..., Any],
    in_axes: int | None | tuple[Any, ...] = 0,
    on_merge: Literal["warn", "error"] = "warn",
) -> Callable[..., Any]:
    """Batches a function of one example, giving each example its own adapter.

        routed(stacked, index, params, x)[i]
            = fn(merge(stacked[index[i]], params), x[i])

    The frozen kernels stay shared: the whole batch is multiplied by each once, and
    every example by its own thin factors (which are gathered: `batch` copies of an
    adapter). Factors are computed (scaled, with a DoRA's norm) once per adapter or once
    per example, whichever are fewer, so the cost does not grow with K. A `Full` leaf is
    gathered too, so use it only for norms and biases. Swapping in other adapters of the
    same shapes does not recompile.

    Args:
      fn: a pure function `fn(params, *args, **kwargs)` of *one* example, as for
        `jax.vmap`; for a model that expects a batch, `lambda params, x:
        model(params, x[None])[0]`.
      in_axes: the batch axes of `args`, as in `jax.vmap`: one number for all of them,
        or a tuple with an entry for each; None for what all examples share.
      on_merge: as in `lorax.adapt`; a merge here forms one kernel per example.

    Returns:
      `routed(stacked, index, params, *args, lora_key=None, **kwargs)`, with `stacked`
      from `compose.stack`, and `index: int[batch]` choosing each example's adapter.
      Keyword arguments are shared and passed to `fn` unchanged. Every output has a
      leading batch axis. An index outside [0, K) raises if its value is known, and
      gives NaN under `jit`.

    Raises:
      ValueError: (when called) the index is not an integer vector or is out of range,
        or the adapters are not a stack or do not fit.

    Example:
      >>> import lorax
      >>> make = lambda c: {"w": lorax.Lora(
      ...     jnp.ones((2, 1)), jnp.full((1, 1), c), 1.0, lorax.Axes((0,), (1,))
      ... )}
      >>> routed = route(lambda params, x: x @ params["w"])
      >>> stacked, params = stacks.stack([make(0.0), make(5.0)]), jnp.zeros((2, 1))
      >>> routed(stacked, jnp.array([1, 0]), {"w": params}, jnp.ones((2, 2))).tolist()
      [[10.0], [0.0]]
    """
    adapted = transform.adapt(fn, on_merge)

    def routed(
        stacked: Adapters,
        index: jax.Array,
        params: PyTree,
        *args: Any,
        lora_key: jax.Array | None = None,
        **kwargs: Any,
    ) -> Any:
        size = stacks.count(stacked)
        index = _checked(index, size)
        if size <= len(index):
            chosen = _chosen(_made(stacked, params), index)
        else:
            chosen = _made(_chosen(stacked, index), params)
        keys = None if lora_key is None else jax.random.split(lora_key, index.shape[0])

        def one(adapters: Adapters, key: jax.Array | None, args: tuple) -> Any:
            return adapted(adapters, params, *args, lora_key=key, **kwargs)

        return jax.vmap(one, (0, 0, in_axes))(chosen, keys, args)

    return routed


def _checked(index: Any, size: int) -> jax.Array:
    """The index, with everything out of range set to K so that the gather fills it."""
    index = jnp.asarray(index)
    if index.ndim != 1 or not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(
            f"index has shape {index.shape} and dtype {index.dtype}; give one integer "
            "per example, int[batch]"
        )
    if tree.is_concrete(index):  # read with NumPy: under jit, jnp would trace it
        if wrong := {i for i in np.asarray(index).tolist() if not 0 <= i < size}:
            raise ValueError(
                f"index holds {sorted(wrong)}, but the stack has {size} adapters: give "
                f"numbers from 0 to {size - 1}"
            )
    return jnp.where((index < 0) | (index >= size), size, index)


def _chosen(stacked: Adapters, index: jax.Array) -> Adapters:
    """Each example's adapter; NaN where the index is out of range."""

    def taken(leaf: jax.Array) -> jax.Array:
        floats = jnp.issubdtype(leaf.dtype, jnp.inexact)
        return leaf.at[index].get(mode="fill", fill_value=jnp.nan if floats else None)

    return jax.tree.map(taken, stacked)


def _made(stacked: Adapters, params: PyTree) -> Adapters:
    """The factors of every adapter in a stack, for the leaf they all share."""
    params, frozen = tree.split(params)
    leaves = tree.flatten(params)
    tree.require(stacked, leaves, "parameter tree")
    made: dict[str, Any] = {}
    for path, adapters in stacked.items():
        leaf = jnp.asarray(leaves[path])

        def factors(adapter: Any, path: str = path, leaf: Any = leaf) -> Any:
            adapter.check(path, leaf)
            return bound(adapter, frozen, path).factors(leaf)

        found = jax.vmap(factors)(adapters)
        whole: Any = adapters
        made[path] = adapters
        if found is not None:
            rate = getattr(whole, "dropout", 0.0)
            made[path] = _Made(found, whole.axes, rate)
    return made
