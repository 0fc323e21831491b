"""The train step: by hand, then guard, donation, composition, bad input."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorax import steps, training
from lorax.adapters import Full, Lora
from lorax.types import Axes
from tests import programs

DENSE = Axes((0,), (1,))
KEY = jax.random.key(0)


def regression(params, batch):
    """Squared error of a linear model, a mean over the batch."""
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


def small(rows=8, dtype=jnp.float32, seed=0):
    """A perturbed rank-2 adapter, its kernel, and a batch."""
    draw = np.random.default_rng(seed).normal
    array = lambda *shape: jnp.asarray(draw(size=shape), dtype)
    adapters = {"w": Lora(array(4, 2), array(2, 3), 0.5, DENSE)}
    batch = {"x": array(rows, 4), "y": array(rows, 3)}
    return adapters, {"w": array(4, 3)}, batch


def one_step(loss_fn, tx, adapters, params, batch, model_state=None, **options):
    """The state before and after a step, and the step's metrics."""
    state = training.create_state(KEY, adapters, tx, model_state)
    step = jax.jit(training.make_train_step(loss_fn, tx, **options))
    after, metrics = step(state, params, batch)
    return state, after, metrics


@training.simple_loss
def product(params, batch):
    """A loss whose gradient is the batch."""
    return jnp.sum(params["w"] * batch)


def leaves_equal(left, right):
    """Whether two trees hold the same bits (keys are compared by their data)."""
    raw = lambda x: (
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    )
    same = jax.tree.map(lambda a, b: np.array_equal(raw(a), raw(b)), left, right)
    return all(jax.tree.leaves(same))


def masked(params, batch):
    """Mean squared error over the rows that `batch["mask"]` keeps."""
    error = jnp.sum((batch["x"] @ params["w"] - batch["y"]) ** 2, axis=1)
    tokens = batch["mask"].sum()
    mean = jnp.sum(error * batch["mask"]) / tokens
    return mean, {"weight": tokens, "error": mean, "largest": error.max()}


# By hand


def test_sgd_step_by_hand():
    # w = [[1], [0]] + 2 * [[1], [1]] @ [[0.5]] = [[2], [1]]; x @ w = 3, y = 1, so the
    # loss is 4 and dL/dw = 2 * 2 * [[1], [1]]; gA = 2 G B^T, gB = 2 A^T G.
    adapters = {"w": Lora(jnp.ones((2, 1)), jnp.full((1, 1), 0.5), 2.0, DENSE)}
    params = {"w": jnp.array([[1.0], [0.0]])}
    batch = {"x": jnp.ones((1, 2)), "y": jnp.ones((1, 1))}
    loss_fn = training.simple_loss(regression)
    _, state, metrics = one_step(loss_fn, optax.sgd(0.125), adapters, params, batch)
    assert metrics["loss"] == 4.0
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(16 + 16 + 256))
    np.testing.assert_array_equal(state.adapters["w"].a, [[0.5], [0.5]])
    np.testing.assert_array_equal(state.adapters["w"].b, [[-1.5]])
    assert (state.step, state.skipped, metrics["skipped"]) == (1, 0, 0)


def test_clipping_by_hand():
    adapters, params = {"w": Full(jnp.zeros(2))}, {"w": jnp.zeros(2)}
    grad, tx = jnp.array([3.0, 4.0]), optax.sgd(1.0)
    for bound, want in [(1.0, [-0.6, -0.8]), (5.0, [-3.0, -4.0]), (9.0, [-3.0, -4.0])]:
        _, state, metrics = one_step(
            product, tx, adapters, params, grad, clip_norm=bound
        )
        np.testing.assert_allclose(state.adapters["w"].value, want, rtol=1e-6)
        assert metrics["grad_norm"] == 5.0
    zero = jnp.zeros(2)  # zero gradients do not give 0 / 0
    _, state, _ = one_step(product, tx, adapters, params, zero, clip_norm=1.0)
    np.testing.assert_array_equal(state.adapters["w"].value, [0.0, 0.0])
    assert state.skipped == 0


# The guard


def fragile(params, model_state, batch, key):
    """A NaN loss, or a finite loss with a NaN gradient, as the batch says."""
    del key
    loss = params["w"] * batch["loss"] + jnp.sqrt(params["w"] * batch["root"])
    return loss, ({"value": batch["loss"]}, {"count": model_state["count"] + 1})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing(accumulate):
    def loss_fn(params, model_state, batch, key):
        return fragile(params, model_state, {k: v[0] for k, v in batch.items()}, key)

    tx = optax.adam(0.1)
    state = training.create_state(
        KEY, {"w": Full(jnp.ones(()))}, tx, {"count": jnp.zeros((), int)}
    )
    step = jax.jit(training.make_train_step(loss_fn, tx, accumulate=accumulate))
    params = {"w": jnp.ones(())}
    good = {"loss": jnp.ones(2), "root": jnp.ones(2)}
    state, _ = step(state, params, good)
    bad = [("loss", jnp.nan), ("loss", -jnp.inf), ("root", 0.0)]
    for skips, (name, value) in enumerate(bad, start=1):
        # The last microbatch is the bad one.
        batch = good | {name: good[name].at[accumulate - 1].set(value)}
        after, metrics = step(state, params, batch)
        for field in ("adapters", "opt_state", "model_state", "key"):
            assert leaves_equal(getattr(state, field), getattr(after, field)), field
        assert after.skipped == metrics["skipped"] == skips
        assert after.step == state.step + 1
        state = after
    after, metrics = step(state, params, good)
    assert after.adapters["w"].value < state.adapters["w"].value
    assert (after.skipped, after.step) == (3, 5)
    assert after.model_state["count"] == 2 * accumulate


def test_a_model_state_that_turns_nan_is_not_kept():
    def loss_fn(params, model_state, batch, key):
        del key
        new = {"mean": model_state["mean"] * batch, "least": model_state["least"]}
        return params["w"] * 1.0, ({}, new)

    adapters, params = {"w": Full(jnp.ones(()))}, {"w": jnp.ones(())}
    model_state = {"mean": jnp.ones(2), "least": jnp.array(jnp.inf)}
    for batch, skipped in [(2.0, 0), (jnp.nan, 1)]:
        state, after, _ = one_step(
            loss_fn, optax.sgd(0.1), adapters, params, batch, model_state
        )
        assert after.skipped == skipped
        assert leaves_equal(state.model_state, after.model_state) == bool(skipped)


def once_inf(count):
    """A rate of 0.1, and of inf at the third update."""
    return jnp.where(count == 2, jnp.inf, 0.1)


# Loss and gradient are finite but the optimiser's result is not: how many of four steps
# it takes before that.
SPOILT = {
    "rate": (optax.adam(jnp.nan), jnp.float32, 0),
    "schedule": (optax.adam(once_inf), jnp.float32, 2),
    "injected": (optax.inject_hyperparams(optax.sgd)(once_inf), jnp.float32, 2),
    # b starts at zero, so a has no gradient: 0 / (sqrt(0) + eps).
    "eps of 0": (optax.adam(0.1, eps=0.0), jnp.float32, 0),
    "eps below float16": (optax.adam(0.1), jnp.float16, 0),
    # 300^2 is beyond float16: the second moment is inf, and the step it makes is 0.
    "moment": (optax.adam(0.1, b2=0.0, eps=1e-3), jnp.float16, 0),
}


@pytest.mark.parametrize("name, accumulate", [*((n, 1) for n in SPOILT), ("rate", 2)])
def test_an_update_that_is_not_finite_changes_nothing(name, accumulate):
    tx, dtype, taken = SPOILT[name]
    adapters, params, batch = small()
    ones = jnp.ones if name == "moment" else jnp.zeros
    adapters = {"w": Lora(adapters["w"].a, ones((2, 3)), 0.5, DENSE)}
    adapters = jax.tree.map(lambda leaf: leaf.astype(dtype), adapters)
    batch = {"x": batch["x"], "y": batch["y"] * (3e3 if name == "moment" else 1.0)}
    state = training.create_state(KEY, adapters, tx)
    step = training.make_train_step(
        training.simple_loss(regression), tx, accumulate=accumulate
    )
    step = jax.jit(step)
    for done in range(4):
        after, metrics = step(state, params, batch)
        assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
        assert after.skipped == metrics["skipped"] == max(0, done + 1 - taken)
        kept = leaves_equal(after.adapters, state.adapters)
        kept &= leaves_equal(after.opt_state, state.opt_state)
        assert kept == (done >= taken)
        floats = [x for x in jax.tree.leaves(after) if x.dtype == dtype]
        assert all(np.isfinite(x).all() for x in floats)
        state = after


def test_what_was_infinite_from_the_start_stops_nothing():
    adapters, params, batch = small()
    best = optax.contrib.reduce_on_plateau()  # whose best value starts at inf
    tx = optax.chain(optax.sgd(0.01), best)

    def update(updates, state, params=None, **extra):
        return tx.update(updates, state, params, value=jnp.inf)

    loss_fn = training.simple_loss(regression)
    own = optax.GradientTransformationExtraArgs(tx.init, update)
    before, after, _ = one_step(loss_fn, own, adapters, params, batch)
    assert np.isinf(before.opt_state[1].best_value)
    assert after.skipped == 0 and not leaves_equal(before.adapters, after.adapters)


def test_the_guard_costs_a_reduction_over_the_state(monkeypatch):
    """By XLA's own counts: the same products, and a few operations per number."""
    params = {f"layer_{i}": jnp.ones((64, 64)) for i in range(3)}
    tx, batch = optax.adamw(0.1), jnp.ones((32, 64))

    def loss_fn(params, batch):
        for kernel in params.values():
            batch = jnp.tanh(batch @ kernel)
        return jnp.mean(batch**2)

    def compiled():
        adapters = {
            name: Lora(jnp.ones((64, 8)), jnp.zeros((8, 64)), 1.0, DENSE)
            for name in params
        }
        state = training.create_state(KEY, adapters, tx)
        step = training.make_train_step(training.simple_loss(loss_fn), tx)
        step = jax.jit(step, donate_argnums=0).lower(state, params, batch).compile()
        return step, sum(leaf.size for leaf in jax.tree.leaves(state))

    guarded, size = compiled()
    monkeypatch.setattr(steps, "stays_finite", lambda new, old: jnp.array(True))
    plain, _ = compiled()
    count = lambda step, op: step.as_text().count(f" {op}(")
    for op in ("dot", "custom-call", "while", "all-reduce", "convolution"):
        assert count(guarded, op) == count(plain, op), op
    # One reduction per factor and both its moments, in each of two stages.
    assert count(guarded, "reduce") <= count(plain, "reduce") + 2 * 6
    flops = lambda step: step.cost_analysis()["flops"]
    assert 0 < flops(guarded) - flops(plain) <= 20 * size  # Adam itself takes 14
    memory = lambda step: step.memory_analysis().temp_size_in_bytes
    assert memory(guarded) <= memory(plain) + 4 * size


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_without_target_tokens_is_skipped(accumulate):
    adapters, params, batch = small()
    batch["mask"] = jnp.zeros(8)
    loss_fn, tx = training.simple_loss(masked), optax.adamw(0.1)
    state, after, _ = one_step(
        loss_fn, tx, adapters, params, batch, accumulate=accumulate
    )
    assert leaves_equal(after.adapters, state.adapters)
    assert after.skipped == 1


# Jit, donation, composition with optax


@pytest.mark.parametrize(
    "tx, accumulate",
    [
        (optax.adamw(optax.linear_schedule(1e-2, 0.0, 10)), 2),
        (optax.inject_hyperparams(optax.adam)(learning_rate=0.01), 1),
        (optax.MultiSteps(optax.adam(0.01), 2), 1),
        (optax.MultiSteps(optax.inject_hyperparams(optax.lion)(1e-3), 2), 2),
        (optax.chain(optax.clip(1.0), optax.lion(1e-3)), 1),
    ],
    ids=["schedule", "inject_hyperparams", "MultiSteps", "both", "chain"],
)
def test_donated_steps_compile_once_and_learn(tx, accumulate):
    adapters, params, batch = small()
    state = training.create_state(KEY, adapters, tx, {"n": 0})
    step = training.make_train_step(
        training.simple_loss(regression), tx, accumulate=accumulate, clip_norm=1.0
    )
    step, traces = programs.counted(step)
    step = jax.jit(step, donate_argnums=0)
    kind_of = lambda x: (x.shape, x.dtype, getattr(x, "weak_type", False))
    kind = jax.tree.map(kind_of, state)
    history = []
    for _ in range(4):
        previous, (state, metrics) = state, step(state, params, batch)
        history.append(metrics)
        assert previous.adapters["w"].a.is_deleted()
    assert len(traces) == 1
    assert kind == jax.tree.map(kind_of, state)
    assert history[-1]["loss"] < history[0]["loss"]
    assert [int(m["skipped"]) for m in history] == [0] * 4  # outlives the donation
    assert not adapters["w"].a.is_deleted() and not params["w"].is_deleted()


def test_multi_steps_updates_every_other_step():
    adapters, params, batch = small()
    tx = optax.MultiSteps(optax.sgd(0.1), 2)
    state = training.create_state(KEY, adapters, tx)
    step = jax.jit(training.make_train_step(training.simple_loss(regression), tx))
    half, _ = step(state, params, batch)
    full, _ = step(half, params, batch)
    assert leaves_equal(state.adapters, half.adapters)
    assert not leaves_equal(state.adapters, full.adapters)


def test_donation_spares_a_buffer_shared_with_params():
    params = {"w": jnp.ones(3)}
    tx = optax.sgd(0.1)
    state = training.create_state(KEY, {"w": Full(params["w"])}, tx)
    step = jax.jit(training.make_train_step(product, tx), donate_argnums=0)
    step(state, params, 2.0)
    np.testing.assert_array_equal(params["w"], np.ones(3))


def test_create_state_is_abstract_first():
    adapters, params, batch = small()
    tx = optax.adam(0.1)
    create = functools.partial(training.create_state, tx=tx)
    abstract = jax.eval_shape(create, KEY, adapters)
    step = training.make_train_step(training.simple_loss(regression), tx)
    after, _ = jax.eval_shape(step, abstract, params, batch)
    assert jax.tree.structure(after) == jax.tree.structure(abstract)
    assert after == abstract


def test_the_optimiser_gets_the_base():
    def pull(updates, state, params=None, *, base, **extra):
        del params, extra
        return jax.tree.map(lambda u: u + base["w"].sum(), updates), state

    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), pull)
    tx = optax.chain(optax.sgd(0.0), tx)
    adapters, params = {"w": Full(jnp.zeros(2))}, {"w": jnp.array([1.0, 2.0])}
    _, state, _ = one_step(product, tx, adapters, params, 1.0)
    np.testing.assert_array_equal(state.adapters["w"].value, [3.0, 3.0])


# Bad input


@pytest.mark.parametrize("accumulate", [0, -1, 2.0, True, "2"])
def test_accumulate_must_be_a_count(accumulate):
    with pytest.raises(ValueError, match="accumulate must be an int of at least 1"):
        training.make_train_step(product, optax.sgd(0.1), accumulate=accumulate)


@pytest.mark.parametrize("tx", [1e-3, optax.adam, None])
def test_tx_must_be_a_transformation(tx):
    with pytest.raises(TypeError, match="must be an optax transformation"):
        training.make_train_step(product, tx)
    with pytest.raises(TypeError, match="must be an optax transformation"):
        training.create_state(KEY, {"w": Full(jnp.ones(1))}, tx)


def test_construction_names_the_mistake():
    for bound in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="clip_norm must be positive, or None"):
            training.make_train_step(product, optax.sgd(0.1), clip_norm=bound)
    with pytest.raises(TypeError, match="loss_fn must be a function"):
        training.make_train_step({"loss": 1}, optax.sgd(0.1))
    with pytest.raises(ValueError, match="on_merge='ignore'"):
        training.make_train_step(product, optax.sgd(0.1), on_merge="ignore")
    with pytest.raises(ValueError, match="adapters is empty"):
        training.create_state(KEY, {}, optax.sgd(0.1))
    for key in (0, np.zeros(2, np.uint32)):
        with pytest.raises(ValueError, match=r"key must be typed, jax.random.key"):
            training.create_state(key, {"w": Full(jnp.ones(1))}, optax.sgd(0.1))


@pytest.mark.parametrize(
    "out, message",
    [
        (
            lambda w, m: w,
            r"must return \(loss, \(metrics, model_state\)\).*simple_loss",
        ),
        (lambda w, m: (w, {"a": w}), r"must return \(loss, \(metrics, model_state\)\)"),
        (
            lambda w, m: (w[None], ({}, m)),
            r"the loss has shape \(1,\); return its mean",
        ),
        (lambda w, m: (w, ([w], m)), "metrics must be a dict"),
        (lambda w, m: (w, ({"loss": w}, m)), r"the step reports \['loss'\] itself"),
        (lambda w, m: (w, ({"weight": w[None]}, m)), r'"weight"\] has shape \(1,\)'),
        (lambda w, m: (w, ({}, {})), "given a model_state"),
        (lambda w, m: (w, ({}, {"n": m["n"][None]})), "given a model_state"),
    ],
)
def test_a_loss_outside_the_protocol_is_named(out, message):
    def loss_fn(params, model_state, batch, key):
        del batch, key
        return out(params["w"], model_state)

    tx = optax.sgd(0.1)
    state = training.create_state(KEY, {"w": Full(jnp.ones(()))}, tx, {"n": 1.0})
    step = training.make_train_step(loss_fn, tx)
    with pytest.raises(ValueError, match=message):
        jax.jit(step)(state, {"w": jnp.ones(())}, 1.0)
