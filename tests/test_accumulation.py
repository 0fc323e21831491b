"""Accumulation: by hand, against the large batch, and the norms of microbatches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorax import training
from lorax.adapters import Full
from tests.test_training import KEY, masked, one_step, product, regression, small


def test_accumulation_by_hand():
    # Two microbatches (rows 0, 2 and 1, 3) with 3 and 1 target tokens: losses 1 and 5.
    def loss_fn(params, batch):
        loss = params["w"] * batch["loss"][0]
        return loss, {"weight": batch["tokens"].sum(), "value": batch["loss"][0]}

    loss, tokens = jnp.array([1.0, 5.0, 1.0, 5.0]), jnp.array([1, 1, 2, 0])
    _, state, metrics = one_step(
        training.simple_loss(loss_fn),
        optax.sgd(1.0),
        {"w": Full(jnp.ones(()))},
        {"w": jnp.ones(())},
        {"loss": loss, "tokens": tokens},
        accumulate=2,
    )
    assert metrics["loss"] == metrics["value"] == metrics["grad_norm"] == 2.0
    assert metrics["weight"] == 4.0
    assert state.adapters["w"].value == -1.0


@pytest.mark.parametrize("accumulate", [4, 8])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float64", 1e-6)])
def test_accumulation_is_the_large_batch(accumulate, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        adapters, params, batch = small(dtype=dtype)
        # Unequal weights; with 8 microbatches two of them have no target at all.
        batch["mask"] = jnp.array([1, 0, 1, 1, 1, 0, 1, 1], dtype)
        tx = optax.adam(0.1)
        results = []
        for count in (1, accumulate):
            loss_fn = training.simple_loss(masked)
            _, state, metrics = one_step(
                loss_fn, tx, adapters, params, batch, accumulate=count
            )
            assert state.skipped == 0
            metrics.pop("largest")  # a maximum is not a mean over tokens
            results.append((state.adapters, metrics))
        for one, many in zip(*map(jax.tree.leaves, results), strict=True):
            assert one.dtype == many.dtype
            np.testing.assert_allclose(one, many, rtol=tolerance, atol=tolerance)


def test_without_a_weight_microbatches_count_alike():
    adapters, params, batch = small()
    loss_fn, tx = training.simple_loss(regression), optax.sgd(0.1)
    _, one, _ = one_step(loss_fn, tx, adapters, params, batch)
    _, four, _ = one_step(loss_fn, tx, adapters, params, batch, accumulate=4)
    for left, right in zip(*map(jax.tree.leaves, (one, four)), strict=True):
        if not jnp.issubdtype(left.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(left, right, rtol=1e-5)


def test_bfloat16_adapters_accumulate_in_float32():
    # 1 + 255 * 2^-8 needs float32: in bfloat16 every summand after the first is lost.
    zero = jnp.zeros((), jnp.bfloat16)
    batch = jnp.full(256, 2.0**-8, jnp.bfloat16).at[0].set(1.0)
    _, state, metrics = one_step(
        product, optax.sgd(1.0), {"w": Full(zero)}, {"w": zero}, batch, accumulate=256
    )
    assert metrics["grad_norm"] == (1 + 255 * 2**-8) / 256
    assert state.adapters["w"].value.dtype == jnp.bfloat16


def test_model_state_passes_through_the_microbatches():
    def loss_fn(params, model_state, batch, key):
        del key
        seen = model_state["seen"] * 10 + batch[0].astype(jnp.int32)
        return params["w"] * batch.mean(), ({}, {"seen": seen})

    adapters, params = {"w": Full(jnp.ones(()))}, {"w": jnp.ones(())}
    batch, model_state = jnp.array([1.0, 2.0, 3.0]), {"seen": 0}
    _, state, _ = one_step(
        loss_fn, optax.sgd(0.1), adapters, params, batch, model_state, accumulate=3
    )
    assert state.model_state["seen"] == 123


def test_a_batch_that_does_not_divide_is_named():
    adapters, params, batch = small(rows=6)
    tx = optax.sgd(0.1)
    state = training.create_state(KEY, adapters, tx)
    step = training.make_train_step(training.simple_loss(regression), tx, accumulate=4)
    with pytest.raises(ValueError, match=r"batch\['x'\] has shape \(6, 4\)"):
        step(state, params, batch)
    with pytest.raises(ValueError, match=r"batch\['t'\] has shape \(\)"):
        step(state, params, {"t": 1.0})
    uneven = {"x": batch["x"][:4], "y": jnp.ones((8, 3))}
    with pytest.raises(ValueError, match=r"batch\['y'\] has shape \(8, 3\).*leading"):
        step(state, params, uneven)


# What the optimiser is told about the microbatches


def recorder():
    """A transformation that records its extra arguments, with plain SGD's sign."""
    names = ("small", "large", "small_batch", "large_batch")

    def update(updates, state, params=None, *, microbatch, **extra):
        del params, extra
        if microbatch is None:
            return updates, {**state, "none": state["none"] + 1}
        kept = {name: jnp.float32(getattr(microbatch, name)) for name in names}
        return updates, {**state, **kept}

    init = lambda params: dict.fromkeys(("none", *names), 0.0)
    return optax.GradientTransformationExtraArgs(init, update)


def test_microbatch_norms_by_hand():
    # Gradients of the rows: (3, 4), (0, 2), (3, 0), (0, 6); two microbatches of two
    # rows, 0 and 2, 1 and 3: sums (6, 4) and (0, 8), squares 52 and 64, mean 58. The
    # mean gradient is (3, 6), its square 45.
    batch = jnp.array([[3.0, 4.0], [0.0, 2.0], [3.0, 0.0], [0.0, 6.0]])
    adapters, params = {"w": Full(jnp.zeros(2))}, {"w": jnp.zeros(2)}
    tx = optax.chain(recorder(), optax.sgd(1.0))
    _, state, metrics = one_step(
        product, tx, adapters, params, batch, accumulate=2, clip_norm=0.5
    )
    want = {"none": 0, "small": 58, "large": 45, "small_batch": 2, "large_batch": 4}
    assert {k: float(v) for k, v in state.opt_state[0].items()} == want
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(45), rtol=1e-6)
    _, state, _ = one_step(product, tx, adapters, params, batch)
    assert state.opt_state[0]["none"] == 1


def test_a_microbatch_without_targets_has_no_norm():
    adapters, params, batch = small()
    batch["mask"] = jnp.array([1, 0, 1, 1, 1, 0, 1, 1], jnp.float32)
    loss_fn = training.simple_loss(masked)
    _, state, _ = one_step(loss_fn, recorder(), adapters, params, batch, accumulate=4)
    alone = []  # rows 0, 4; 1, 5 (masked out); 2, 6; 3, 7
    for rows in ((0, 4), (2, 6), (3, 7)):
        own = {name: value[jnp.array(rows)] for name, value in batch.items()}
        _, _, metrics = one_step(loss_fn, optax.sgd(0.0), adapters, params, own)
        alone.append(float(metrics["grad_norm"]) ** 2)
    np.testing.assert_allclose(state.opt_state["small"], np.mean(alone), rtol=1e-5)


def test_norms_inside_wrappers_of_optax():
    adapters, params, batch = small()
    tx = optax.MultiSteps(optax.chain(recorder(), optax.adam(0.1)), 1)
    loss_fn = training.simple_loss(regression)
    _, state, _ = one_step(loss_fn, tx, adapters, params, batch, accumulate=2)
    seen = state.opt_state.inner_opt_state[0]
    assert seen["small"] >= seen["large"] > 0  # Jensen's inequality
    assert (seen["small_batch"], seen["large_batch"]) == (4, 8)
