"""Population training: K stacked adapters on one frozen base, one program, one step.

    step_population(state, params, batch) = vmap over k of step(state_k, params, batch)

Members differ in key, learning rate or whatever else `optax.inject_hyperparams`
exposes, in alpha, and in rank: narrower factors are padded with zeros to the widest,
which changes nothing, for

    a @ b = [a 0] @ [b; 0],    d loss / d [a 0] = s x^T g [b; 0]^T = [d loss / d a, 0]

and likewise for b, so zero columns have zero gradients. Scale and true rank of a member
travel beside the state, in `Population.pairs`, to the loss and to `tx.update`: each
member does what it would have done alone. An optimiser that acts leaf by leaf on the
*shape* of a factor sees the padded rank, such as the width factors of
`optax.contrib.muon`; elementwise ones and lorax's own pair transforms do not.

What no member's values reach is kept once: the step, and the counts of the optimiser,
so that a `lax.cond` on a count stays a cond. (Batched, it would run both branches.) A
count goes on as soon as one member takes the batch: a member that skips a batch which
others take keeps its factors and moments, but not the place in its schedule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lorax import stacking, training, transform
from lorax.adapters import ranks
from lorax.losses import LossFn, Metrics
from lorax.training import TrainState
from lorax.types import Adapters, MicrobatchNorms, PairStatics, PyTree


@flax.struct.dataclass
class Population:
    """The training states of K members.

    Attributes:
      state: every leaf `[K, ...]`, but for the step and the optimiser's counts, which
        the members share. Read adapters with `member`: here their static scale is the
        first member's, and their factors are padded.
      pairs: `{path: PairStatics}` of arrays `[K]`, for adapters whose scale or rank
        differs between members.
      scale_bits: for the same paths uint32 `[K, 2]`, the scales in float64: what
        `member` gives back is exact, and no static field that would compile anew.
    """

    state: TrainState
    pairs: dict[str, PairStatics]
    scale_bits: dict[str, jax.Array]

    @property
    def size(self) -> int:
        """The number of members, K."""
        return self.state.key.shape[0]


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
      keys: K typed keys, one a member.
      members: K adapter trees for one and the same `params`; ranks and scales may
        differ, whatever else is static may not.
      tx: the optimiser of every member.
      params: the frozen base, or the `Base` that holds what all members share; only
        shapes are read.
      hyperparams: `{name: K values}` for arguments of an `optax.inject_hyperparams`
        in `tx`; the members share those not named.
      model_state: of `create_state`; every member starts from it.

    Returns:
      A Population at step 0.

    Raises:
      ValueError: members that cannot be stacked; the message names path and field. A
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
            f"{len(members)} members need as many keys, one each; keys has the shape "
            f"{keys.shape}"
        )
    adapters, pairs = stacking.stack(members)
    create = lambda key, own: training.create_state(key, own, tx, model_state)
    state: TrainState = jax.vmap(create)(keys, adapters)
    given = _set_hyperparams(state.opt_state, hyperparams or {}, len(members))
    shared = _shared_counts(tx, adapters, given, hyperparams or {}, params, pairs)
    own = lambda shared, leaf: leaf[0] if shared else leaf
    state = dataclasses.replace(
        state, step=state.step[0], opt_state=jax.tree.map(own, shared, given)
    )
    return Population(state, pairs, {path: _bits(members, path) for path in pairs})


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
      loss_fn: as `make_train_step` takes it.
      tx: the transformation that `create_population` was given.
      accumulate: microbatches per step.
      clip_norm: bound on each member's gradient norm; None for none.
      on_merge: what `lorax.adapt` does when it must form a merged kernel.
      at_once: members in flight, group after group in the same program; None for all.
        Activations take as many times the memory of one run.

    Returns:
      The step; its metrics are those of `make_train_step`, each `[K]`.

    Raises:
      ValueError: `accumulate` or `at_once` below 1, or `clip_norm` not positive.
      TypeError: `tx` is no optax transformation, or `loss_fn` not callable.

    Example:
      >>> import lorax
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
        # Of what is shared, any member that took the batch has the new value.
        first = jnp.argmax(after.skipped == before.skipped)
        same = lambda old, new: new if old.ndim else new[first]
        state = jax.tree.map(same, before, after)
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
      loss_fn: as `make_eval_step` takes it.
      on_merge: what `lorax.adapt` does when it must form a merged kernel.
      at_once: members in flight, as `make_population_step` takes it.

    Raises:
      ValueError: `at_once` below 1.
      TypeError: `loss_fn` is not callable.
    """
    _require_count(at_once)
    single = training.make_eval_step(loss_fn, on_merge=on_merge)

    def step(population: Population, params: PyTree, batch: PyTree) -> Metrics:
        return _map_members(single, population, params, batch, at_once)

    return step


def member(population: Population, index: int) -> Adapters:
    """Returns one member's adapters, with its own ranks and scales.

    Args:
      population: concrete, outside of jit.
      index: of the member; negative ones count from the end.

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
        raise IndexError(f"member {index} of a population of {population.size}")
    stacked = population.state.adapters
    adapters: Adapters = jax.tree.map(lambda leaf: leaf[index], stacked)
    for path, statics in population.pairs.items():
        bits = np.asarray(population.scale_bits[path][index])
        own = ranks.cut(adapters[path], int(statics.rank[index]))
        adapters[path] = own.replace(scale=float(bits.view(np.float64)[0]))
    return adapters


def unstack(population: Population) -> list[Adapters]:
    """Returns the adapters of all members, see `member`."""
    return [member(population, k) for k in range(population.size)]


def _bits(members: Sequence[Adapters], path: str) -> jax.Array:
    own: list[Any] = [adapters[path] for adapters in members]
    scales = np.array([[adapter.scale] for adapter in own], np.float64)  # [K, 1]
    return jnp.asarray(scales.view(np.uint32))


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
    """Returns `single(state, params, batch, pairs)` of every member, stacked."""
    whole = (population.state, population.pairs)
    leaves, structure = jax.tree.flatten(whole)

    def one(own: list[jax.Array]) -> Any:
        mine = iter(own)
        # What has no axis is shared: leaves of members have at least theirs, [K].
        both = [next(mine) if leaf.ndim else leaf for leaf in leaves]
        state, pairs = jax.tree.unflatten(structure, both)
        return single(state, params, batch, pairs)

    stacked = [leaf for leaf in leaves if leaf.ndim]
    if at_once is None or at_once >= population.size:
        return jax.vmap(one)(stacked)
    return jax.lax.map(one, stacked, batch_size=at_once)


def _injected(key_path: tuple[Any, ...]) -> str:
    """The name of a leaf of `inject_hyperparams`, "" for other leaves."""
    if len(key_path) < 2 or key_path[-2] != jax.tree_util.GetAttrKey("hyperparams"):
        return ""
    return key_path[-1].key


def _set_hyperparams(
    opt_state: PyTree, values: Mapping[str, Sequence[float]], size: int
) -> PyTree:
    """Returns the stacked optimiser state with the members' hyperparameters."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(opt_state)
    # A schedule has a state of the same name, and overwrites what is set.
    scheduled = {
        key.key
        for path, _ in leaves
        for owner, key in zip(path, path[1:], strict=False)
        if owner == jax.tree_util.GetAttrKey("hyperparams_states")
    }
    known = {_injected(path) for path, _ in leaves} - {""} - scheduled
    arrays = {name: jnp.array(given) for name, given in values.items()}
    for name, given in arrays.items():
        if name not in known:
            raise ValueError(
                f"hyperparams[{name!r}]: tx has no such number to set; it has "
                f"{', '.join(sorted(known)) or 'none'}. Make it by "
                f"optax.inject_hyperparams(make_tx)({name}=...), a number, no schedule"
            )
        if given.shape != (size,):
            raise ValueError(
                f"hyperparams[{name!r}] has the shape {given.shape}; give {size} "
                "numbers, one a member"
            )
    set_ = lambda name, leaf: (
        arrays[name].astype(leaf.dtype) if name in arrays else leaf
    )
    new = [set_(_injected(path), leaf) for path, leaf in leaves]
    return jax.tree.unflatten(structure, new)


def _shared_counts(
    tx: optax.GradientTransformationExtraArgs,
    adapters: Adapters,
    opt_state: PyTree,
    hyperparams: Mapping[str, Any],
    params: PyTree,
    pairs: dict[str, PairStatics],
) -> PyTree:
    """Which leaves of the optimiser state, all `[K, ...]`, need no axis: as booleans.

    They are the integers, one a member, that depend on no member's values: neither at
    init nor, given that, after an update.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(opt_state)
    started = _batched(tx.init, 0, adapters)
    shared = [
        leaf.ndim == 1
        and not jnp.issubdtype(leaf.dtype, jnp.inexact)
        and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
        and _injected(path) not in hyperparams
        and not depends
        for (path, leaf), depends in zip(paths, started, strict=True)
    ]
    norms = MicrobatchNorms(jnp.ones(()), jnp.ones(()), 1, 2)

    def update(opt_state: Any, adapters: Any, pairs: Any, params: Any) -> Any:
        extra = {"base": params, "pairs": pairs, "microbatch": norms}
        return tx.update(adapters, opt_state, adapters, **extra)[1]

    while True:
        own = [
            leaf[0] if s else leaf for (_, leaf), s in zip(paths, shared, strict=True)
        ]
        axes = jax.tree.unflatten(structure, [None if s else 0 for s in shared])
        state = jax.tree.unflatten(structure, own)
        after = _batched(update, (axes, 0, 0, None), state, adapters, pairs, params)
        kept = [s and not depends for s, depends in zip(shared, after, strict=True)]
        if kept == shared:
            return jax.tree.unflatten(structure, shared)
        shared = kept


def _batched(function: Callable[..., Any], in_axes: Any, *args: Any) -> list[bool]:
    """Which leaves of the output depend on a mapped argument, without computing any."""
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
        found[:] = [False] * len(leaves)  # and so they stay where vmap meets no axis
        return watch(*leaves)

    jax.eval_shape(jax.vmap(watched, in_axes), *args)
    return found
