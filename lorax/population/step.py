"""Train and evaluation steps mapped over all members."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from lorax import training
from lorax.losses import LossFn, Metrics
from lorax.population.state import Population
from lorax.types import PyTree


def make_population_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    clip_norm: float | None = None,
    on_merge: Literal["warn", "error"] = "warn",
    at_once: int | None = None,
) -> Callable[[Population, PyTree, PyTree], tuple[Population, Metrics]]:
    """Returns `step(population, params, batch) -> (population, metrics)`.

    All members see the same batch and the same `params`. Jit it once, as
    `jax.jit(step, donate_argnums=0)`.

    Args:
      loss_fn: as for `make_train_step`.
      tx: the transformation given to `create_population`.
      accumulate: microbatches per step.
      clip_norm: bound on each member's gradient norm; None for no clipping.
      on_merge: what `lorax.adapt` does when it must form a merged kernel.
      at_once: how many members to run at a time, in one program; None for all.
        Activations take that many times the memory of a single run.

    Returns:
      The step; its metrics are those of `make_train_step`, each `[K]`.

    Raises:
      ValueError: `accumulate` or `at_once` below 1, or `clip_norm` not positive.
      TypeError: `tx` is not an optax transformation, or `loss_fn` is not callable.

    Example:
      >>> import lorax
      >>> from lorax.population import create_population
      >>> loss_fn = training.simple_loss(lambda params, x: jnp.sum(x @ params["w"]))
      >>> params, keys = {"w": jnp.ones((4, 3))}, jax.random.split(jax.random.key(0))
      >>> members = [lorax.init(key, params, [("w", 2)])[0] for key in keys]
      >>> population = create_population(keys, members, optax.sgd(0.1), params)
      >>> step = jax.jit(make_population_step(loss_fn, optax.sgd(0.1)))
      >>> population, metrics = step(population, params, jnp.ones((1, 4)))
      >>> metrics["loss"].tolist(), population.state.step.tolist()
      ([12.0, 12.0], 1)
    """
    _require_count(at_once)
    single = training.make_train_step(
        loss_fn, tx, accumulate=accumulate, clip_norm=clip_norm, on_merge=on_merge
    )

    def step(
        population: Population, params: PyTree, batch: PyTree
    ) -> tuple[Population, Metrics]:
        before = population.state
        after, metrics = _map_members(single, population, params, batch, at_once)
        # Any member that took the batch has the new value of what is shared.
        first = jnp.argmax(after.skipped == before.skipped)
        state = jax.tree.map(
            lambda x, new: new if x.ndim else new[first], before, after
        )
        return dataclasses.replace(population, state=state), metrics

    return step


def make_population_eval_step(
    loss_fn: LossFn,
    *,
    on_merge: Literal["warn", "error"] = "warn",
    at_once: int | None = None,
) -> Callable[[Population, PyTree, PyTree], Metrics]:
    """Returns `step(population, params, batch) -> metrics`, each `[K]`.

    Args:
      loss_fn: as for `make_eval_step`.
      on_merge: what `lorax.adapt` does when it must form a merged kernel.
      at_once: as for `make_population_step`.

    Raises:
      ValueError: `at_once` below 1.
      TypeError: `loss_fn` is not callable.
    """
    _require_count(at_once)
    single = training.make_eval_step(loss_fn, on_merge=on_merge)

    def step(population: Population, params: PyTree, batch: PyTree) -> Metrics:
        return _map_members(single, population, params, batch, at_once)

    return step


def _require_count(at_once: int | None) -> None:
    if at_once is not None and (type(at_once) is not int or at_once < 1):
        raise ValueError(
            f"at_once must be an int of at least 1, or None; got {at_once!r}"
        )


def _map_members(
    single: Callable[..., Any],
    population: Population,
    params: PyTree,
    batch: PyTree,
    at_once: int | None,
) -> Any:
    """Returns `single(state, params, batch, pairs)` for every member, stacked."""
    whole = (population.state, population.pairs)
    leaves, structure = jax.tree.flatten(whole)

    def one(own: list[jax.Array]) -> Any:
        mine = iter(own)
        # A leaf without axes is shared: members' leaves have at least the axis [K].
        both = [next(mine) if leaf.ndim else leaf for leaf in leaves]
        state, pairs = jax.tree.unflatten(structure, both)
        return single(state, params, batch, pairs)

    stacked = [leaf for leaf in leaves if leaf.ndim]
    if at_once is None or at_once >= population.size:
        return jax.vmap(one)(stacked)
    return jax.lax.map(one, stacked, batch_size=at_once)
