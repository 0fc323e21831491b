"""The combined state of K members: how to create it and take it apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.serialization
import flax.struct
import jax
import jax.numpy as jnp
import optax

from lorax import training, transform
from lorax.adapters import ranks
from lorax.population import introspection, roster
from lorax.training import TrainState
from lorax.types import Adapters, PairStatics, PyTree


@flax.struct.dataclass
class Population:
    """The training states of K members.

    Attributes:
      state: every leaf is `[K, ...]`, except for the step and the optimiser's counts,
        which the members share. Read adapters with `member`: here their static scale is
        the first member's, and their factors are padded.
      pairs: `{path: PairStatics}` of arrays `[K]`, for adapters whose scale or rank
        differs between members; the program reads these.
      roster: the same as exact Python numbers, which `member` restores. It is static,
        like the scale of an adapter: members with other ranks or scales are another
        program.
    """

    state: TrainState
    pairs: dict[str, PairStatics]
    roster: roster.Roster = flax.struct.field(pytree_node=False)

    @property
    def size(self) -> int:
        """The number of members, K."""
        return self.state.key.shape[0]


def _saved(population: Population) -> dict[str, Any]:
    """The population as nested dicts of arrays, for flax and orbax."""
    parts = {"state": population.state, "pairs": population.pairs}
    named = {k: flax.serialization.to_state_dict(part) for k, part in parts.items()}
    return {**named, "roster": population.roster.saved()}


def _read(template: Population, saved: Mapping[str, Any]) -> Population:
    """The population from what `_saved` returned, or an older lorax wrote."""
    found = roster.read(saved)
    parts = {"state": template.state, "pairs": template.pairs}
    read = {
        name: flax.serialization.from_state_dict(part, saved[name], name=name)
        for name, part in parts.items()
    }
    return Population(**read, roster=found)


flax.serialization.register_serialization_state(
    Population, _saved, _read, override=True
)


def create_population(
    keys: jax.Array | Sequence[jax.Array],
    members: Sequence[Adapters],
    tx: optax.GradientTransformation,
    params: PyTree,
    *,
    hyperparams: Mapping[str, Sequence[float]] | None = None,
    model_state: PyTree = None,
) -> Population:
    """Returns the population before its first step.

    Args:
      keys: K typed keys, one per member.
      members: K adapter trees for the same `params`; ranks and scales may differ, other
        static fields may not.
      tx: the optimiser of every member.
      params: the frozen base, or the `Base` with the arrays that all members share;
        only shapes are read.
      hyperparams: `{name: K values}` for arguments of an `optax.inject_hyperparams`
        in `tx`; members share those not named.
      model_state: as for `create_state`; every member starts from it.

    Returns:
      A Population at step 0.

    Raises:
      ValueError: members that cannot be stacked (the message names path and field), a
        number of keys or values other than K, or a hyperparameter that `tx` lacks.

    Example:
      >>> import lorax
      >>> params = {"w": jnp.ones((4, 3))}
      >>> keys = [jax.random.key(0), jax.random.key(1)]
      >>> members = [lorax.init(keys[0], params, lorax.Target("w", rank=2))[0],
      ...            lorax.init(keys[1], params, lorax.Target("w", rank=1))[0]]
      >>> tx = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
      >>> rates = {"learning_rate": (1e-3, 3e-3)}
      >>> population = create_population(keys, members, tx, params, hyperparams=rates)
      >>> population.state.adapters["w"].a.shape, population.pairs["w"].rank
      ((2, 4, 2), Array([2, 1], dtype=int32))
    """
    tx, members = training.transformation(tx), list(members)
    if not members:
        raise ValueError("members is empty: give the adapters of at least one")
    for adapters in members:
        transform.check(adapters, params)
    keys = keys if isinstance(keys, jax.Array) else jnp.stack(list(keys))
    if keys.shape != (len(members),):
        raise ValueError(
            f"{len(members)} members need one key each; keys has shape {keys.shape}"
        )
    adapters, pairs, enrolled = roster.enrol(members)

    def create(key: jax.Array, own: Adapters) -> TrainState:
        return training.create_state(key, own, tx, model_state)

    state: TrainState = jax.vmap(create)(keys, adapters)
    values = hyperparams or {}
    opt_state = introspection.with_hyperparams(state.opt_state, values, len(members))
    state = dataclasses.replace(state, opt_state=opt_state)
    shared = introspection.shared_counts(tx, state, params, pairs, own=values)
    counts = jax.tree.map(lambda s, x: x[0] if s else x, shared, opt_state)
    state = dataclasses.replace(state, step=state.step[0], opt_state=counts)
    return Population(state, pairs, enrolled)


def member(population: Population, index: int) -> Adapters:
    """Returns one member's adapters, with its own ranks and scales.

    Args:
      population: the population, outside jit.
      index: the member's index; negative ones count from the end.

    Raises:
      IndexError: no such member.

    Example:
      >>> import lorax
      >>> params, key = {"w": jnp.ones((4, 3))}, jax.random.key(0)
      >>> members = [lorax.init(key, params, [("w", rank)])[0] for rank in (1, 3)]
      >>> keys = jax.random.split(key)
      >>> population = create_population(keys, members, optax.sgd(0.1), params)
      >>> member(population, 0)["w"].a.shape
      (4, 1)
    """
    if not -population.size <= index < population.size:
        raise IndexError(
            f"there is no member {index} in a population of {population.size}"
        )
    stacked = population.state.adapters
    adapters: Adapters = jax.tree.map(lambda leaf: leaf[index], stacked)
    for path, own in population.roster.of(index).items():
        adapters[path] = ranks.cut(adapters[path], own.rank).replace(scale=own.scale)
    return adapters


def unstack(population: Population) -> list[Adapters]:
    """Returns the adapters of all members; see `member`."""
    return [member(population, k) for k in range(population.size)]
