"""Riemannion against dense numpy float64, and its claim: no gauge matters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorax import optim
from lorax.adapters import Lora
from tests.optim import problems

N, M, R, S = 9, 7, 2, 1.5
RATE, BETA, DECAY = 0.1, 0.8, 0.3


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def lora(a, b):
    return Lora(jnp.asarray(a), jnp.asarray(b), S, problems.DENSE)


DRAW = np.random.default_rng(0).normal
TARGET, START = DRAW(size=(N, M)), (DRAW(size=(N, R)), DRAW(size=(R, M)))


def gradient(d):
    """The gradient of sum tanh^2 of the residual, by hand."""
    t = np.tanh(d - TARGET)
    return 2 * t * (1 - t**2)


def products(tx, gauge, steps=5):
    """s a b after every step, using only the factors' gradients."""
    loss = lambda w: jnp.sum(jnp.tanh(S * w["w"].a @ w["w"].b - TARGET) ** 2)

    @jax.jit
    def step(w, state):
        updates, state = tx.update(jax.grad(loss)(w), state, w)
        return optax.apply_updates(w, updates), state

    a, b = START
    w = {"w": lora(a @ gauge, np.linalg.solve(gauge, b))}
    state, found = tx.init(w), []
    for _ in range(steps):
        w, state = step(w, state)
        found.append(S * np.asarray(w["w"].a @ w["w"].b))
    return np.array(found), w["w"]


def tangent(d, x):
    """The projection of x onto the tangent space at d, computed densely."""
    u, _, vt = np.linalg.svd(d)
    pu, pv = u[:, :R] @ u[:, :R].T, vt[:R].T @ vt[:R]
    return pu @ x + x @ pv - pu @ x @ pv


def test_steps_by_dense_numpy():
    got, last = products(optim.riemannion(RATE, BETA, weight_decay=DECAY), np.eye(R))
    d, momentum = S * START[0] @ START[1], 0.0
    for i in range(5):
        moved = tangent(d, momentum) if i else 0.0
        momentum = BETA * moved + (1 - BETA) * tangent(d, gradient(d))
        u, _, vt = np.linalg.svd(momentum)
        z = tangent(d, u[:, : 2 * R] @ vt[: 2 * R])
        u, s, vt = np.linalg.svd((1 - RATE * DECAY) * d - RATE * z)
        d = u[:, :R] * s[:R] @ vt[:R]
        np.testing.assert_allclose(got[i], d, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(last.a.T @ last.a, last.b @ last.b.T, atol=1e-10)


@pytest.mark.parametrize("kind", ["orthogonal", "general"])
def test_the_path_of_the_product_does_not_depend_on_the_gauge(kind):
    gauge = np.random.default_rng(1).normal(size=(R, R))
    gauge = np.linalg.qr(gauge)[0] if kind == "orthogonal" else gauge
    own = lambda g: products(optim.riemannion(RATE, weight_decay=DECAY), g)[0]
    np.testing.assert_allclose(own(gauge), own(np.eye(R)), rtol=1e-7, atol=1e-8)
    adam = lambda g: products(optax.adam(RATE), g)[0]
    assert np.abs(adam(gauge) - adam(np.eye(R))).max() > 0.05


def test_retraction_is_the_best_of_its_rank_in_the_nearest_factors():
    w = {"w": lora(*START)}
    step = problems.like(w)["w"]
    tx = optax.chain(optax.scale(1e-3), optim.retract())
    update = tx.update({"w": step}, tx.init(w), w)[0]["w"]
    a, b = START
    whole = a @ b + 1e-3 * (np.asarray(step.a) @ b + a @ np.asarray(step.b))
    u, s, vt = np.linalg.svd(whole)
    got = (a + update.a) @ (b + update.b)
    np.testing.assert_allclose(got, u[:, :R] * s[:R] @ vt[:R], atol=1e-12)
    balanced = {"w": lora(a + update.a, b + update.b)}
    update = tx.update({"w": step}, tx.init(balanced), balanced)[0]["w"]
    for u, f in zip((update.a, update.b), (step.a, step.b), strict=True):
        assert 0 < np.linalg.norm(u) < 3e-3 * np.linalg.norm(f)


def test_nothing_dies_while_b_is_zero():
    a, _ = START
    w = {"w": lora(a, np.zeros((R, M)))}
    zero = {"w": lora(np.zeros_like(a), S * a.T @ TARGET)}
    for rate, dead in ((lambda count: 0.1 * count, True), (0.1, False)):
        tx = optim.riemannion(rate)  # warm-up from zero
        updates, state = tx.update(zero, tx.init(w), w)
        new = optax.apply_updates(w, updates)
        if dead:
            np.testing.assert_array_equal(new["w"].a, a)
            updates, _ = tx.update(zero, state, new)
            new = optax.apply_updates(new, updates)
        product = S * np.asarray(new["w"].a @ new["w"].b)
        assert np.linalg.matrix_rank(product) == R
        # the polar factor of G on the columns of a
        q = np.linalg.qr(a)[0]
        u, _, vt = np.linalg.svd(q @ q.T @ TARGET)
        np.testing.assert_allclose(product, -0.1 * u[:, :R] @ vt[:R], atol=1e-9)


def test_a_kernel_smaller_than_its_rank():
    w = {"w": Lora(jnp.ones((4, 3)), jnp.ones((3, 2)), 1.0, problems.DENSE)}
    tx = optim.riemannion(0.1)
    updates, _ = tx.update(problems.like(w), tx.init(w), w)
    assert all(np.isfinite(u).all() and u.any() for u in jax.tree.leaves(updates))


def test_errors():
    with pytest.raises(ValueError, match="beta=1.0; give a decay rate"):
        optim.riemannion(0.1, beta=1.0)
    for tx in (optim.scale_by_riemannion(), optim.retract()):
        with pytest.raises(ValueError, match="w: .* the p, lam, q of AdaLora"):
            tx.init({"w": problems.adalora()})
        w = {"w": lora(*START)}
        with pytest.raises(ValueError, match="reads the adapters"):
            tx.update(w, tx.init(w))
