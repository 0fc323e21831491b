"""Populations: by hand, each member against its own run, padding."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import lorax
from lorax import population as pop
from lorax import training
from lorax.adapters import Lora
from lorax.optim._pairwise import map_pairs
from lorax.types import Axes
from tests import programs

DENSE = Axes((0,), (1,))
STEPS = 12


def network(params, batch):
    """Mean squared error of two scanned layers and a head, all to be adapted."""
    layer = lambda x, w: (jnp.tanh(x @ w), None)
    x, _ = jax.lax.scan(layer, batch["x"], params["layers"])
    return jnp.mean((x @ params["head"] + params["bias"] - batch["y"]) ** 2)


@functools.cache
def problem(dtype="float32"):
    """Frozen params, how they are used, and a batch."""
    params = {
        "layers": programs.normal(1, 2, 6, 6) / 2,
        "head": programs.normal(2, 6, 3),
        "bias": jnp.zeros(3),
    }
    batch = {"x": programs.normal(3, 8, 6), "y": programs.normal(4, 8, 3)}
    params, batch = jax.tree.map(lambda x: x.astype(dtype), (params, batch))
    return params, lorax.discover(network, params, batch), batch


def member_of(seed, rank=2, alpha=4.0, adapter="lora", dtype="float32", **options):
    """One member's adapters: both kernels, and the bias whole."""
    params, kernels, _ = problem(dtype)
    low_rank = functools.partial(lorax.Target, "layers|head", rank=rank, alpha=alpha)
    targets = [
        low_rank(adapter=adapter, dtype=dtype, **options),
        lorax.Target("bias", adapter="full", dtype=dtype),
    ]
    return lorax.init(jax.random.key(seed), params, targets, kernels)[0]


def keys_of(count):
    return [jax.random.key(100 + k) for k in range(count)]


def run(step, state, params, batch, steps):
    """The state after some steps of one compiled program, and all their metrics."""
    step = jax.jit(step, donate_argnums=0).lower(state, params, batch)
    step = step.compile({"xla_backend_optimization_level": 0})
    history = []
    for _ in range(steps):
        state, metrics = step(
            state, params, batch
        )  # of the same structure, or it raises
        history.append(metrics)
    return state, history


def train(loss_fn, tx, members, steps=STEPS, hyperparams=None, state=None, **options):
    """A population after some steps, and the metrics of every step."""
    params, _, batch = problem(str(members[0]["bias"].value.dtype))
    population = pop.create_population(
        keys_of(len(members)),
        members,
        tx,
        params,
        hyperparams=hyperparams,
        model_state=state,
    )
    step = pop.make_population_step(loss_fn, tx, **options)
    return run(step, population, params, batch, steps)


def train_alone(loss_fn, tx, members, k, steps=STEPS, state=None, **options):
    """The k-th member in its own run."""
    params, _, batch = problem(str(members[0]["bias"].value.dtype))
    alone = training.create_state(keys_of(len(members))[k], members[k], tx, state)
    step = training.make_train_step(loss_fn, tx, **options)
    return run(step, alone, params, batch, steps)


def assert_same(got, want, tolerance=1e-5):
    """Same tree, and every leaf within `tolerance` of its own largest entry."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        atol = tolerance * max(1e-2, float(np.abs(b).max()))
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


LOSS = training.simple_loss(network)


# By hand


def test_an_sgd_step_of_two_members_by_hand():
    # One example x = (1, 1), y = 1, w = (1, 0).
    # Member 0, rank 1, scale 2: w + 2 (1, 1) * 0.5 = (2, 1), x w = 3, so the gradient
    # of w is G = 2 (3 - 1) (1, 1) = (4, 4); of a it is 2 G b = (4, 4), of b 2 a G = 16.
    # Member 1, rank 2, scale 1: w + (0.25, 0.5) = (1.25, 0.5), x w = 1.75, G = (1.5,
    # 1.5); of a it is G b^T, of b it is a^T G = (1.5, 1.5).
    members = [
        {"w": Lora(jnp.ones((2, 1)), jnp.full((1, 1), 0.5), 2.0, DENSE)},
        {"w": Lora(jnp.eye(2), jnp.array([[0.25], [0.5]]), 1.0, DENSE)},
    ]
    params = {"w": jnp.array([[1.0], [0.0]])}
    loss_fn = training.simple_loss(lambda p, x: jnp.mean((x @ p["w"] - 1.0) ** 2))
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.0)
    rates = {"learning_rate": (0.125, 0.25)}
    population = pop.create_population(
        keys_of(2), members, tx, params, hyperparams=rates
    )
    step = jax.jit(pop.make_population_step(loss_fn, tx))
    population, metrics = step(population, params, jnp.ones((1, 2)))
    np.testing.assert_allclose(metrics["loss"], [4.0, 0.5625])
    first, second = (adapters["w"] for adapters in pop.unstack(population))
    np.testing.assert_allclose(first.a, [[0.5], [0.5]])
    np.testing.assert_allclose(first.b, [[-1.5]])
    np.testing.assert_allclose(second.a, [[0.90625, -0.1875], [-0.09375, 0.8125]])
    np.testing.assert_allclose(second.b, [[-0.125], [0.125]])
    assert (first.scale, first.rank) == (2.0, 1)
    assert (second.scale, second.rank) == (1.0, 2)


# Every member does what it would have done alone


def lora_plus(learning_rate, ratio):
    """AdamW whose b moves `ratio` times as fast, by roles."""
    roles = lambda adapters: {
        path: adapter.replace(**adapter.roles) for path, adapter in adapters.items()
    }
    fast = optax.adamw(learning_rate * ratio, weight_decay=0.01)
    slow = optax.adamw(learning_rate, weight_decay=0.01)
    return optax.partition({"a": slow, "b": fast, "value": slow}, roles)


def test_lora_members_of_unequal_rank_alpha_seed_rate_and_ratio():
    members = [member_of(0, 1, 2.0), member_of(1, 3, 16.0), member_of(2, 2, 4.0)]
    rates, ratios = (1e-2, 3e-3, 2e-2), (1.0, 4.0, 16.0)
    tx = optax.inject_hyperparams(lora_plus)(learning_rate=1.0, ratio=1.0)
    hyperparams = {"learning_rate": rates, "ratio": ratios}
    population, history = train(LOSS, tx, members, hyperparams=hyperparams)
    for k, adapters in enumerate(pop.unstack(population)):
        own = lora_plus(rates[k], ratios[k])
        alone, metrics = train_alone(LOSS, own, members, k)
        assert_same(adapters, alone.adapters)
        got = [{name: v[k] for name, v in row.items()} for row in history]
        assert_same(got, metrics)
        assert metrics[-1]["loss"] < metrics[0]["loss"]


def scaled_by_statics(learning_rate):
    """A pair transformation that reads scale and rank, like LoRA-Pro."""

    def update(updates, state, params=None, *, pairs=None, **extra):
        del extra
        change = lambda u, p: (u.a / (p.scale**2 * p.rank), u.b / p.scale)
        return map_pairs(change, updates, params, pairs), state

    own = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    return optax.chain(own, optax.sgd(learning_rate, momentum=0.9))


def counting(params, model_state, batch, key):
    """The network under noise from the key, and a count."""
    noise = 0.0 if key is None else 0.1 * jax.random.normal(key, batch["y"].shape)
    loss = network(params, {**batch, "y": batch["y"] + noise})
    return loss, ({"noise": jnp.sum(noise)}, {"n": model_state["n"] + 1})


# (name, ranks, alphas, other fields of the target, optimiser, options of the step)
CASES = [
    ("pair", (1, 3), (2.0, 12.0), {}, scaled_by_statics, {}),
    ("dora", (3, 1), (6.0, 3.0), {"adapter": "dora"}, optax.adam, {}),
    ("adalora", (2, 2), (2.0, 12.0), {"adapter": "adalora"}, optax.adam, {}),
    (
        "dropout",
        (2, 3),
        (4.0, 4.0),
        {"dropout": 0.2},
        optax.adamw,
        {"accumulate": 2, "clip_norm": 0.1},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_members_equal_their_own_runs(case):
    # In float64 any difference beyond rounding shows, and Adam does not amplify
    # rounding, as it does in float32 for gradients that cancel.
    with jax.enable_x64(True):
        _, ranks, alphas, spec, make_tx, options = case
        make = functools.partial(member_of, dtype="float64", **spec)
        members = [make(k, *of) for k, of in enumerate(zip(ranks, alphas))]
        rates = (2e-2, 5e-3)
        options = {**options, "state": {"n": jnp.int32(0)}}
        tx = optax.inject_hyperparams(make_tx)(learning_rate=0.0)
        population, history = train(
            counting, tx, members, hyperparams={"learning_rate": rates}, **options
        )
        for k, adapters in enumerate(pop.unstack(population)):
            alone, metrics = train_alone(
                counting, make_tx(rates[k]), members, k, **options
            )
            assert_same(adapters, alone.adapters, 1e-11)
            got = [{name: v[k] for name, v in row.items()} for row in history]
            assert_same(got, metrics, 1e-11)
            assert population.state.model_state["n"][k] == alone.model_state["n"]
        assert set(population.pairs) == {"layers", "head"}


def test_evaluation_sees_each_members_own_scale_as_the_merge_does():
    members = [member_of(0, 1, 2.0, "dora"), member_of(1, 3, 12.0, "dora")]
    population, _ = train(LOSS, optax.sgd(0.05), members, steps=3)
    params, _, batch = problem()
    evaluate = jax.jit(pop.make_population_eval_step(LOSS))
    merged = jax.jit(lambda own: network(lorax.merge(own, params), batch))
    losses = [merged(own) for own in pop.unstack(population)]
    assert losses[0] != losses[1]
    np.testing.assert_allclose(
        evaluate(population, params, batch)["loss"], jnp.stack(losses), rtol=1e-5
    )


# Padding


def noisy(learning_rate):
    """SGD that moves every entry, including zeros."""
    return optax.noisy_sgd(learning_rate, eta=0.1, key=jax.random.key(7))


def muon(learning_rate):
    """Muon on the factors, AdamW on the bias."""
    dims = lambda adapters: {
        path: jax.tree.map(
            lambda leaf: (
                optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)
                if leaf.ndim > 1
                else None
            ),
            adapter,
        )
        for path, adapter in adapters.items()
    }
    return optax.contrib.muon(learning_rate, muon_weight_dimension_numbers=dims)


OPTIMISERS = [
    (adapter, make_tx)
    for adapter in ("lora", "dora")
    for make_tx in (optax.adam, optax.adamw, optax.sgd, optax.lion, muon, noisy)
    if adapter == "lora" or make_tx in (optax.adam, noisy)
]


@pytest.mark.parametrize(("adapter", "make_tx"), OPTIMISERS)
def test_padded_columns_stay_exactly_zero(adapter, make_tx):
    members = [member_of(0, 1, adapter=adapter), member_of(1, 3, adapter=adapter)]
    population, _ = train(LOSS, make_tx(0.05), members, steps=4)
    for path in ("layers", "head"):
        a, b = (getattr(population.state.adapters[path], name)[0] for name in "ab")
        rank_axis = b.ndim - 2
        assert jnp.all(a[..., 1:] == 0), path
        assert jnp.all(jax.lax.slice_in_dim(b, 1, 3, axis=rank_axis) == 0), path
        start = members[0][path]
        moved = jax.tree.map(
            lambda new, old: bool(jnp.any(new != old)),
            pop.member(population, 0)[path],
            start.replace(scale=pop.member(population, 0)[path].scale),
        )
        assert all(jax.tree.leaves(moved)), path
