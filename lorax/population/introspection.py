"""Finds hyperparameters, and counts that members share, in an optimiser's state.

Both are found from the state, and from what the transformation does with it, however
deeply optax has wrapped it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lorax.training import TrainState
from lorax.types import MicrobatchNorms, PairStatics, PyTree

INJECTED = jax.tree_util.GetAttrKey("hyperparams")
SCHEDULED = jax.tree_util.GetAttrKey("hyperparams_states")


def with_hyperparams(
    opt_state: PyTree, values: Mapping[str, Sequence[float]], size: int
) -> PyTree:
    """Returns the stacked optimiser state with the members' hyperparameters."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(opt_state)
    known = {_injected(path) for path, _ in leaves} - {""} - _scheduled(leaves)
    arrays = {name: jnp.array(given) for name, given in values.items()}
    for name, given in arrays.items():
        if name not in known:
            raise ValueError(
                f"hyperparams[{name!r}]: tx has no such number to set; it has "
                f"{', '.join(sorted(known)) or 'none'}. Build tx with "
                f"optax.inject_hyperparams(make_tx)({name}=...), and a number there, "
                "not a schedule"
            )
        if given.shape != (size,):
            raise ValueError(
                f"hyperparams[{name!r}] has shape {given.shape}; give {size} "
                "numbers, one per member"
            )
    new = []
    for path, leaf in leaves:
        name = _injected(path)
        new.append(arrays[name].astype(leaf.dtype) if name in arrays else leaf)
    return jax.tree.unflatten(structure, new)


def shared_counts(
    tx: optax.GradientTransformationExtraArgs,
    state: TrainState,
    params: PyTree,
    pairs: dict[str, PairStatics],
    own: Collection[str] = (),
) -> PyTree:
    """Returns a tree of booleans: which optimiser-state leaves need no member axis.

    Of the leaves `[K, ...]`, these are the integers with one value per member that do
    not depend on any member's values, neither at init nor after an update.

    Args:
      tx: the optimiser of every member.
      state: state of K members, before the first step.
      params: the frozen base; only shapes are read.
      pairs: the statics in which members differ.
      own: hyperparameters that differ between members.
    """
    adapters, opt_state = state.adapters, state.opt_state
    paths, structure = jax.tree_util.tree_flatten_with_path(opt_state)
    started = _batched(tx.init, 0, adapters)
    shared = [
        _is_count(leaf) and _injected(path) not in own and not depends
        for (path, leaf), depends in zip(paths, started, strict=True)
    ]
    norms = MicrobatchNorms(jnp.ones(()), jnp.ones(()), 1, 2)

    def update(opt_state: Any, adapters: Any, pairs: Any, params: Any) -> Any:
        extra = {"base": params, "pairs": pairs, "microbatch": norms}
        return tx.update(adapters, opt_state, adapters, **extra)[1]

    while True:
        leaves = [x[0] if s else x for (_, x), s in zip(paths, shared, strict=True)]
        axes = jax.tree.unflatten(structure, [None if s else 0 for s in shared])
        one = jax.tree.unflatten(structure, leaves)
        after = _batched(update, (axes, 0, 0, None), one, adapters, pairs, params)
        kept = [s and not depends for s, depends in zip(shared, after, strict=True)]
        if kept == shared:
            return jax.tree.unflatten(structure, shared)
        shared = kept


def _is_count(leaf: jax.Array) -> bool:
    """True for one integer or boolean per member; a key is neither."""
    other = jnp.inexact, jax.dtypes.extended
    return leaf.ndim == 1 and not any(jnp.issubdtype(leaf.dtype, d) for d in other)


def _scheduled(leaves: Sequence[tuple[tuple[Any, ...], Any]]) -> set[str]:
    """Hyperparameters that a schedule overwrites, as shown by its own state."""
    return {
        key.key
        for path, _ in leaves
        for owner, key in zip(path, path[1:], strict=False)
        if owner == SCHEDULED
    }


def _injected(key_path: tuple[Any, ...]) -> str:
    """The name of a leaf from `inject_hyperparams`, "" for other leaves."""
    return key_path[-1].key if INJECTED in key_path[-2:-1] else ""


def _batched(function: Callable[..., Any], in_axes: Any, *args: Any) -> list[bool]:
    """Which leaves of the output depend on a mapped argument, found without running."""
    found: list[bool] = []

    @jax.custom_batching.custom_vmap
    def watch(*leaves: jax.Array) -> tuple[jax.Array, ...]:
        return leaves

    @watch.def_vmap
    def rule(size: int, in_batched: Any, *leaves: jax.Array) -> Any:
        found[:] = in_batched
        return leaves, tuple(in_batched)

    def watched(*args: Any) -> Any:
        leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(function(*args))]
        found[:] = [False] * len(leaves)  # stays so if no leaf is mapped
        return watch(*leaves)

    jax.eval_shape(jax.vmap(watched, in_axes), *args)
    return found
