"""A method's frozen arrays belong to the second argument, wherever parameters go."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import lorax
from lorax import analysis, compose, optim, population, sharding, training, tree
from tests import programs
from tests.frozen_model import (
    HIDDEN,
    IN,
    KEY,
    NORMS,
    OUT,
    SIGNS,
    TARGETS,
    X,
    by_hand,
    fn,
    hadamard,
    loss_fn,
    plain,
    same,
    started,
    trained,
)
from tests.plugin import methods

# ------------------------------------------------------------------- the base


def test_the_second_argument_holds_what_does_not_train():
    adapters, base = started()
    assert isinstance(base, lorax.Base)
    assert set(base.frozen) == {SIGNS, NORMS, "down/norms"}  # the signs are shared
    np.testing.assert_array_equal(np.abs(base.frozen[SIGNS]), np.ones(IN))
    columns = np.linalg.norm(np.asarray(base.params["up"], np.float64), axis=0)
    np.testing.assert_allclose(base.frozen[NORMS], columns, rtol=1e-6)
    shapes = {x.shape for x in jax.tree.leaves(adapters)}
    assert shapes == {(8,), (16,)}  # weights, and the bias: nothing frozen
    moments = jax.tree.leaves(optax.adam(1e-3).init(adapters)[0].mu)
    assert len(moments) == len(jax.tree.leaves(adapters)) == 3
    assert [*tree.flatten(base)] == ["bias", "down", "up"]
    replaced = tree.replace(base, {"bias": 0.0})
    assert replaced.params["bias"] == 0.0 and replaced.frozen is base.frozen


def test_merge_and_adapt_against_numpy():
    adapters, base = trained()
    merged = lorax.merge(adapters, base)
    for path in ("up", "down"):
        want = by_hand(adapters, base, path)
        np.testing.assert_allclose(merged[path], want, rtol=1e-5, atol=1e-6)
    got = lorax.adapt(fn, on_merge="error")(adapters, base, X)
    np.testing.assert_allclose(got, fn(merged, X), rtol=2e-5, atol=2e-5)
    gradient = jax.grad(lorax.adapt(loss_fn))(adapters, base, X)
    assert jax.tree.structure(gradient) == jax.tree.structure(adapters)


def test_a_base_that_lacks_an_array_is_refused():
    adapters, base = trained()
    with pytest.raises(ValueError, match="up: Walsh needs the frozen array 'wals"):
        lorax.merge({"up": adapters["up"]}, base.params)
    less = lorax.Base(base.params, {SIGNS: base.frozen[SIGNS]})
    with pytest.raises(ValueError, match="needs the frozen array 'down/norms'"):
        lorax.adapt(fn)(adapters, less, X)


def test_a_second_init_takes_the_arrays_of_its_base():
    _, base = started()
    _, again = started(jax.random.key(7), base)
    same(again, base)
    _, other = started(jax.random.key(7))
    assert np.any(other.frozen[SIGNS] != base.frozen[SIGNS])
    wrong = lorax.Base(base.params, {**base.frozen, NORMS: 2 * base.frozen[NORMS]})
    with pytest.raises(ValueError, match=r"up: the Base given has a frozen arr"):
        started(KEY, wrong)
    small = lorax.Base(base.params, {SIGNS: jnp.ones(3)})
    with pytest.raises(ValueError, match=r"of shape \(3,\) that differs from the one"):
        started(KEY, small)


# ----------------------------------------------------------------- sharding


SPECS = {
    "up": PartitionSpec("fsdp", "tensor"),
    "down": PartitionSpec("tensor", "fsdp"),
    "bias": PartitionSpec(),
}


def test_frozen_arrays_lie_as_their_kernels_do_or_whole():
    adapters, base = trained()
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    placed = sharding.place(base, mesh, rules=[*SPECS.items()])
    lies = sharding.base_shardings(base, adapters, placed)
    assert lies.frozen[SIGNS].spec == PartitionSpec()  # two kernels share it
    assert lies.frozen[NORMS].spec == PartitionSpec("tensor")
    assert lies.frozen["down/norms"].spec == PartitionSpec("fsdp")
    assert lies.params["up"].spec == SPECS["up"]
    tx = optax.adam(1e-2)
    step = training.make_train_step(training.simple_loss(loss_fn), tx)
    state = training.create_state(KEY, adapters, tx)
    alone, metrics = jax.jit(step)(state, base, X)
    where = sharding.state_shardings(state, placed)
    across = jax.jit(step, out_shardings=(where, None))(
        jax.device_put(state, where),
        jax.device_put(base, lies),
        jax.device_put(X, sharding.batch_sharding(mesh)),
    )
    np.testing.assert_allclose(across[1]["loss"], metrics["loss"], rtol=1e-5)
    for one, two in zip(
        jax.tree.leaves(across[0].adapters),
        jax.tree.leaves(alone.adapters),
        strict=True,
    ):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


def test_a_placement_says_what_places_a_base():
    adapters, base = trained()
    mesh = sharding.make_mesh(data=4, fsdp=2)
    placed = sharding.place(base, mesh, rules=[(".*", PartitionSpec())])
    with pytest.raises(ValueError, match=r"use sharding.base_shardings\(params, adapt"):
        placed.tree(base)
    with pytest.raises(KeyError, match="Base has no leaf 'walsh/8'"):
        sharding.base_shardings(base.params, adapters, placed)
    lora, params = lorax.init(KEY, plain(), [("up", 2)])
    lies = sharding.base_shardings(params, lora, placed)
    assert jax.tree.structure(lies) == jax.tree.structure(params)


# ------------------------------------------------- what else takes parameters


def test_training_and_what_reads_the_base_beside_it():
    """One step of SGD with decay towards the base: by hand, from jax.grad of merge."""
    adapters, base = trained()
    tx = optax.chain(optim.add_decayed_weights(0.1, full=True), optax.sgd(0.01))
    step = training.make_train_step(training.simple_loss(loss_fn), tx)
    state, _ = step(training.create_state(KEY, adapters, tx), base, X)
    dense = jax.grad(loss_fn)(lorax.merge(adapters, base), X)
    signs, norms = (np.asarray(base.frozen[n]) for n in (SIGNS, NORMS))
    turn = hadamard(IN)
    within = signs[:, None] * np.asarray(dense["up"]) * norms
    gradient = np.diag(turn @ within @ turn) / IN
    weights = np.asarray(adapters["up"].weights)
    want = weights - 0.01 * (adapters["up"].scale * gradient + 0.1 * weights)
    np.testing.assert_allclose(state.adapters["up"].weights, want, rtol=1e-4, atol=1e-5)
    bias = adapters["bias"].value
    want = bias - 0.01 * (dense["bias"] + 0.1 * (bias - base.params["bias"]))
    np.testing.assert_allclose(state.adapters["bias"].value, want, rtol=1e-5)


def test_merged_decay_and_analysis_beside_a_base():
    """Products of factors find their base in it, with frozen arrays or without."""
    target = [lorax.Target("down", rank=2), TARGETS[0]]
    adapters, base = lorax.init(KEY, plain(), target)
    lora = {"down": programs.perturbed(adapters, 0.3)["down"]}
    tx = optim.add_decayed_spectral_norm(0.1, target="merged")
    zero = jax.tree.map(jnp.zeros_like, lora)
    found = [
        tx.update(zero, tx.init(lora), lora, base=params)[0]
        for params in (base, base.params)
    ]
    same(*found)
    assert np.any(found[0]["down"].b)
    one = analysis.amplification(KEY, lora, base)
    same(one, analysis.amplification(KEY, lora, base.params))
    same(
        analysis.intruder_dimensions(KEY, lora, base),
        analysis.intruder_dimensions(KEY, lora, base.params),
    )
    with pytest.raises(ValueError, match="down: target='merged' multiplies"):
        tx.init({"down": adapters["up"]})


def test_reports_count_and_measure_a_base():
    adapters, base = trained()
    report = lorax.merge_report(adapters, base, jnp.bfloat16)
    want = by_hand(adapters, base, "up")
    rounded = np.asarray(jnp.asarray(want, jnp.bfloat16), np.float64)
    np.testing.assert_allclose(
        report["up"].max, np.abs(rounded - want).max(), rtol=1e-3
    )
    kernels = lorax.discover(fn, base, X)
    found = lorax.describe(base, TARGETS, kernels)
    assert found.parameters == IN + OUT + OUT
    assert {leaf.path for leaf in found} <= {"up", "down", "bias"}
    cost = analysis.cost(adapters, base, kernels)
    frozen = 4 * (IN + HIDDEN + OUT)
    assert cost.adapters.params == cost.full.params + frozen + 4 * (IN + OUT + OUT)
    assert cost.full.trained == IN * HIDDEN + HIDDEN * OUT + OUT


def test_a_population_shares_one_base():
    """Each member trains as it would alone, with its own static scale."""
    first, base = started()
    second, again = lorax.init(
        jax.random.key(1), base, [lorax.Target("up|down", adapter="walsh", alpha=9)]
    )
    same(again, base)
    first = {path: first[path] for path in second}
    members = [programs.perturbed(m, 0.3) for m in (first, second)]
    tx = optax.adam(1e-2)
    keys = jax.random.split(KEY)
    made = population.create_population(keys, members, tx, base)
    step = population.make_population_step(training.simple_loss(loss_fn), tx)
    after, _ = jax.jit(step)(made, base, X)
    single = jax.jit(training.make_train_step(training.simple_loss(loss_fn), tx))
    for k, adapters in enumerate(members):
        alone, _ = single(training.create_state(keys[k], adapters, tx), base, X)
        own = population.member(after, k)
        assert own["up"].scale == adapters["up"].scale
        for path in own:
            np.testing.assert_allclose(
                own[path].weights, alone.adapters[path].weights, rtol=1e-5, atol=1e-6
            )
    other = {p: a.replace(lent=(("signs", "x"), a.lent[1])) for p, a in second.items()}
    more = lorax.Base(base.params, {**base.frozen, "x": base.frozen[SIGNS]})
    with pytest.raises(ValueError, match="member 1 has lent="):
        population.create_population(keys, [first, other], tx, more)


def test_many_adapters_on_one_base():
    adapters, base = trained()
    one = {path: adapters[path] for path in ("up", "down")}
    two = jax.tree.map(lambda x: -x, one)
    two = {path: a.replace(scale=2 * a.scale) for path, a in two.items()}
    stacked = compose.stack([one, two])
    routed = compose.route(fn)(stacked, jnp.array([1, 0]), base, X[:2])
    for row, own in enumerate((two, one)):
        want = fn(lorax.merge(own, base), X[row])
        np.testing.assert_allclose(routed[row], want, rtol=2e-5, atol=2e-5)
    swapped = compose.switch(two, like=one)
    assert swapped["up"].scale == one["up"].scale
    same(lorax.merge(two, base), lorax.merge(swapped, base))
    other = {p: a.replace(lent=(("signs", "x"), a.lent[1])) for p, a in two.items()}
    for call in (
        lambda: compose.stack([one, other]),
        lambda: compose.switch(other, one),
    ):
        with pytest.raises(ValueError, match="has the frozen arrays .* one Base"):
            call()
    with pytest.raises(ValueError, match="combine needs updates that are products"):
        compose.combine([one, two], [0.5, 0.5])


def test_extraction_and_calibration_read_the_parameters():
    _, base = started()
    tuned = jax.tree.map(lambda x: x + 0.1, base.params)
    one = compose.extract(base, tuned, [("up", 2)])
    same(one.adapters, compose.extract(base.params, tuned, [("up", 2)]).adapters)
    with pytest.raises(ValueError, match="adapter='walsh' is not one"):
        compose.extract(base, tuned, TARGETS)
    target = lorax.Target("up", rank=2, init="lora_ga")
    stats = [
        lorax.calibrate(KEY, loss_fn, params, target, [X])
        for params in (base, base.params)
    ]
    same(*stats)
    adapters, moved = lorax.init(KEY, base, target, stats=stats[0])
    assert moved.frozen == base.frozen and moved.params["up"] is not base.params["up"]
    np.testing.assert_allclose(
        lorax.merge(adapters, moved)["up"], base.params["up"], rtol=1e-5, atol=1e-6
    )


def test_the_optimiser_of_the_plugin_against_numpy():
    adapters, base = trained()
    tx = methods.signum(0.1, momentum=0.5, weight_decay=0.2)
    grads = jax.grad(lorax.adapt(loss_fn))(adapters, base, X)
    updates, state = tx.update(grads, tx.init(adapters), adapters)
    updates, _ = tx.update(jax.tree.map(lambda g: -0.4 * g, grads), state, adapters)
    g = np.asarray(grads["up"].weights, np.float64)
    mean = 0.5 * (0.5 * g) + 0.5 * (-0.4 * g)
    weights = np.asarray(adapters["up"].weights, np.float64)
    want = -0.1 * (np.sign(mean) + 0.2 * weights)
    np.testing.assert_allclose(updates["up"].weights, want, rtol=1e-6)
    np.testing.assert_array_equal(  # the bias does not decay
        np.abs(updates["bias"].value), np.full(OUT, np.float32(0.1))
    )
