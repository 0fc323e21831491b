"""The train step on models: keys and dropout, a BatchNorm conv net, an nnx model."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lorax import training, transform
from lorax.adapters import Full, Lora
from lorax.types import Axes
from tests import programs

KEY = jax.random.key(0)


def one_step(loss_fn, tx, adapters, params, batch, model_state=None):
    """The state after a step, and the step's metrics."""
    state = training.create_state(KEY, adapters, tx, model_state)
    return jax.jit(training.make_train_step(loss_fn, tx))(state, params, batch)


def regression(params, batch):
    """Squared error of a linear model, a mean over the batch."""
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


def small():
    """A perturbed rank-2 adapter, its kernel, and a batch."""
    draw = np.random.default_rng(0).normal
    array = lambda *shape: jnp.asarray(draw(size=shape), jnp.float32)
    lora = Lora(array(4, 2), array(2, 3), 0.5, Axes((0,), (1,)))
    return {"w": lora}, {"w": array(4, 3)}, {"x": array(8, 4), "y": array(8, 3)}


def leaves_equal(left, right):
    """Whether two trees of arrays hold the same numbers."""
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, left, right)))


# Keys


def test_every_step_and_microbatch_has_its_own_key():
    def loss_fn(params, model_state, batch, key):
        drawn = jax.random.bits(key)
        keys = jnp.roll(model_state["keys"], 1).at[0].set(drawn)
        return params["w"] * batch.mean(), ({}, {"keys": keys})

    tx = optax.sgd(0.1)
    adapters, params = {"w": Full(jnp.ones(()))}, {"w": jnp.ones(())}
    keys = {"keys": jnp.zeros(6, jnp.uint32)}
    step = jax.jit(training.make_train_step(loss_fn, tx, accumulate=2))
    runs = []
    for seed in (0, 0, 1):
        state = training.create_state(jax.random.key(seed), adapters, tx, keys)
        for _ in range(3):
            state, _ = step(state, params, jnp.ones(2))
        runs.append(state.model_state["keys"].tolist())
    assert runs[0] == runs[1]
    assert len(set(runs[0] + runs[2])) == 12
    assert state.key == jax.random.key(1)


def test_dropout_is_on_in_training_and_off_in_evaluation():
    adapters, params, batch = small()
    dropped = {"w": adapters["w"].replace(dropout=0.5)}
    tx = optax.set_to_zero()
    loss_fn = training.simple_loss(regression)
    step = jax.jit(training.make_train_step(loss_fn, tx))
    evaluate = jax.jit(training.make_eval_step(loss_fn))
    plain = regression(transform.merge(adapters, params), batch)
    losses = []
    state = training.create_state(KEY, dropped, tx)
    for _ in range(3):
        state, metrics = step(state, params, batch)
        losses.append(float(metrics["loss"]))
        np.testing.assert_allclose(
            evaluate(state, params, batch)["loss"], plain, rtol=1e-5
        )
    assert len(set(losses)) == 3 and float(plain) not in losses
    _, metrics = one_step(loss_fn, tx, adapters, params, batch)
    np.testing.assert_allclose(metrics["loss"], plain, rtol=1e-5)


# A BatchNorm conv net


class ConvNet(nn.Module):
    """Convolution, BatchNorm, mean pooling, a linear head."""

    @nn.compact
    def __call__(self, x, train):
        """Returns logits `[batch, 5]` of images `[batch, height, width, channel]`."""
        x = nn.Conv(8, (3, 3), use_bias=False, name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
        x = nn.relu(x).mean(axis=(1, 2))
        return nn.Dense(5, name="head")(x)


def classify(params, model_state, batch, key):
    """Cross-entropy of ConvNet; without a key, uses running statistics."""
    variables = {**params, **model_state}
    logits, new_state = ConvNet().apply(
        variables, batch["image"], train=key is not None, mutable=["batch_stats"]
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    hits = (logits.argmax(-1) == batch["label"]).mean()
    return loss.mean(), ({"accuracy": hits}, new_state)


@pytest.fixture(name="convnet", scope="module")
def make_convnet():
    draw = np.random.default_rng(0).normal  # jax.random.normal is slow to compile
    array = lambda *shape: jnp.asarray(draw(size=shape), jnp.float32)
    label = np.arange(20) % 5
    image = array(5, 6, 6, 3)[label] + 0.1 * array(20, 6, 6, 3)
    norm = {"scale": jnp.ones(8), "bias": jnp.zeros(8)}
    head = {"kernel": 0.3 * array(8, 5), "bias": jnp.zeros(5)}
    conv = {"kernel": 0.2 * array(3, 3, 3, 8)}
    params = {"params": {"conv": conv, "norm": norm, "head": head}}
    statistics = {"mean": jnp.zeros(8), "var": jnp.ones(8)}
    model_state = {"batch_stats": {"norm": statistics}}
    batch = {"image": image, "label": jnp.asarray(label)}
    adapters = {
        "conv/kernel": Lora(
            a=0.1 * array(3, 3, 3, 2),
            b=jnp.zeros((2, 8)),
            scale=2.0,
            axes=Axes((0, 1, 2), (3,)),
        ),
        "norm/scale": Full(norm["scale"]),
        "norm/bias": Full(norm["bias"]),
        "head/kernel": Full(head["kernel"]),
        "head/bias": Full(head["bias"]),
    }
    return adapters, params, model_state, batch


def test_batch_norm_net_first_step_is_the_definition(convnet):
    adapters, params, model_state, batch = convnet
    after, metrics = one_step(
        classify, optax.sgd(1.0), adapters, params, batch, model_state
    )

    @jax.jit
    def definition(adapters):
        merged = transform.merge(adapters, params)
        return classify(merged, model_state, batch, KEY)

    (loss, (_, stats)), grads = jax.value_and_grad(definition, has_aux=True)(adapters)
    want = jax.tree.map(jnp.subtract, adapters, grads)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    for left, right in (after.adapters, want), (after.model_state, stats):
        for got, expected in zip(*map(jax.tree.leaves, (left, right)), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    # b = 0 at the start, so the conv is the base's and its mean is plain numpy's:
    # running mean 0.9 * 0 + 0.1 * the batch's.
    image = np.pad(batch["image"], ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = np.asarray(params["params"]["conv"]["kernel"])
    shifts = [(i, j) for i in range(3) for j in range(3)]
    out = sum(image[:, i : i + 6, j : j + 6] @ kernel[i, j] for i, j in shifts)
    np.testing.assert_allclose(
        after.model_state["batch_stats"]["norm"]["mean"],
        0.1 * out.mean(axis=(0, 1, 2)),
        atol=1e-6,
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_batch_norm_net_learns(convnet, accumulate):
    adapters, params, model_state, batch = convnet
    tx = optax.adam(0.05)
    state = training.create_state(KEY, adapters, tx, model_state)
    before = jax.tree.map(np.asarray, (params, model_state))
    step = training.make_train_step(classify, tx, accumulate=accumulate, clip_norm=1.0)
    step, traces = programs.counted(step)
    step = jax.jit(step, donate_argnums=0)
    evaluate = jax.jit(training.make_eval_step(classify))
    start = evaluate(state, params, batch)
    for _ in range(40):
        state, metrics = step(state, params, batch)
    end = evaluate(state, params, batch)
    assert len(traces) == 1
    assert metrics["accuracy"] == 1.0
    assert end["loss"] < 0.2 * start["loss"] and end["accuracy"] == 1.0
    assert not leaves_equal(state.model_state, model_state)
    assert leaves_equal(before, (params, model_state))
    assert np.abs(state.adapters["conv/kernel"].b).max() > 0.01


def test_batch_norm_net_keeps_its_statistics_from_a_bad_batch(convnet):
    adapters, params, model_state, batch = convnet
    batch = batch | {"image": batch["image"].at[0, 0, 0, 0].set(jnp.nan)}
    after, metrics = one_step(
        classify, optax.adam(0.05), adapters, params, batch, model_state
    )
    # The loss itself may come out finite: XLA:CPU's relu of NaN is 0.
    assert after.skipped == metrics["skipped"] == 1
    assert leaves_equal(after.model_state, model_state)
    assert leaves_equal(after.adapters, adapters)


# An nnx model


class NnxNet(nnx.Module):
    """A linear layer, BatchNorm and dropout, whose key is in the model state."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        """Returns `[batch, 3]`."""
        return self.dropout(self.norm(self.linear(x)))


def test_an_nnx_model_carries_statistics_counts_and_keys():
    graphdef, params, model_state = nnx.split(NnxNet(nnx.Rngs(0)), nnx.Param, ...)

    def loss_fn(params, model_state, batch, key):
        model = nnx.merge(graphdef, params, model_state)
        (model.train if key is not None else model.eval)()
        loss = jnp.mean((model(batch["x"]) - batch["y"]) ** 2)
        return loss, ({}, nnx.state(model, nnx.Not(nnx.Param)))

    adapters, _, batch = small()
    adapters = {"linear/kernel": adapters["w"]}
    tx = optax.adam(0.1)
    state = training.create_state(KEY, adapters, tx, model_state)
    step, traces = programs.counted(training.make_train_step(loss_fn, tx))
    step = jax.jit(step, donate_argnums=0)
    evaluate = jax.jit(training.make_eval_step(loss_fn))
    for count in (1, 2):
        state, _ = step(state, params, batch)
        assert state.model_state["dropout"]["rngs"]["count"].get_value() == count
    assert len(traces) == 1
    assert np.all(state.model_state["norm"]["mean"].get_value() != 0)
    losses = [evaluate(state, params, batch)["loss"] for _ in range(2)]
    assert losses[0] == losses[1]
