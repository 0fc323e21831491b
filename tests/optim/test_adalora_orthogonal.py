"""AdaLoRA's pull of p and q to orthonormality: its forms, and what it leaves alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorax import optim
from lorax.adapters import orthogonal_penalty
from tests.optim.adalora_cases import (
    RATE,
    SHORT,
    applied,
    assert_trees_close,
    drawn,
    pull,
    random_grads,
    two,
)


@pytest.mark.parametrize("form", ["decoupled", "squared", "norm"])
def test_the_penalty_of_each_matrix(form):
    adapters, weight = two(), 0.2
    tx = optim.adalora(
        optax.sgd(RATE), **SHORT, orthogonal_form=form, orthogonal_weight=weight
    )
    grads = random_grads(adapters, 1)
    moved, _ = applied(tx, adapters, [grads])[0]
    rate = 1 if form == "decoupled" else RATE
    for path, layers in (("m", [()]), ("s", [(0,), (1,)])):
        for layer in layers:
            part = lambda tree: [np.asarray(x[layer], np.float64) for x in leaves(tree)]
            leaves = lambda tree: (tree[path].p, tree[path].lam, tree[path].q)
            (p, lam, q), (dp, dlam, dq) = part(adapters), part(grads)
            got = part(moved)
            more_p = pull(p, form, weight, 3, RATE * dp)
            more_q = pull(q.T, form, weight, 3, RATE * dq.T).T
            np.testing.assert_allclose(got[0], p - RATE * dp - rate * more_p, rtol=1e-4)
            np.testing.assert_allclose(got[1], lam - RATE * dlam, rtol=1e-4)
            np.testing.assert_allclose(got[2], q - RATE * dq - rate * more_q, rtol=1e-4)


def test_the_moments_hold_the_task_alone_unless_the_penalty_is_asked_for():
    adapters = two()
    zeros = jax.tree.map(jnp.zeros_like, adapters)
    for form, clean in (("decoupled", True), ("squared", False), ("norm", False)):
        tx = optim.adalora(optax.adam(0.1), **SHORT, orthogonal_form=form)
        moved, state = applied(tx, adapters, [zeros])[0]
        assert (not optax.tree.norm(state.inner[0].mu)) == clean
        assert (not optax.tree.norm(state.sensitivity)) == clean
        # what gets no gradient at all, like p and q at lam = 0, is left alone
        assert np.array_equal(moved["m"].p, adapters["m"].p) == clean


@pytest.mark.parametrize("form", ["squared", "norm"])
def test_the_gradient_is_that_of_the_penalty_function(form):
    adapters = two()
    tx = optim.adalora(
        optax.sgd(1.0), **SHORT, orthogonal_form=form, orthogonal_weight=0.7
    )
    zeros = jax.tree.map(jnp.zeros_like, adapters)
    moved, _ = applied(tx, adapters, [zeros])[0]
    slopes = jax.grad(orthogonal_penalty)(adapters, form)
    want = jax.tree.map(lambda x, slope: x - 0.7 * slope, adapters, slopes)
    assert_trees_close(moved, want, atol=1e-6)


@pytest.mark.parametrize("size", [1e-2, 30.0])
def test_the_decoupled_step_reaches_the_nearest_orthonormal_factor(size):
    own = drawn(0)
    own = dataclasses.replace(own, p=size * own.p, q=size * own.q)
    tx = optim.adalora(
        optax.sgd(1e-7),
        target_budget=3,
        total_steps=100,
        initial_warmup=0,
        final_steps=1,
        orthogonal_weight=1e9,  # as far as one step goes
    )
    moved, _ = applied(tx, {"w": own}, [random_grads({"w": own}, 0)] * 100)[-1]
    for got, start in ((moved["w"].p, own.p), (moved["w"].q.T, own.q.T)):
        u, _, vt = np.linalg.svd(np.asarray(start, np.float64), full_matrices=False)
        # the singular vectors stay, and no singular value has changed its sign
        np.testing.assert_allclose(got, u @ vt, atol=2e-3)
    np.testing.assert_allclose(moved["w"].lam, own.lam, atol=1e-4)


def test_the_decoupled_step_follows_the_rate_and_no_other_matrix():
    adapters, grads = two(), random_grads(two(), 1)

    def pulled(rate, adapters):
        """What the default adds to the update, divided by the rate."""
        own = {path: grads[path] for path in adapters}
        step = lambda **weight: applied(
            optim.adalora(optax.sgd(rate), **SHORT, **weight), adapters, [own]
        )[0][0]["m"]
        left = jax.tree.map(jnp.subtract, step(), step(orthogonal_weight=0.0))
        return jax.tree.map(lambda x: x / rate, left)

    whole = pulled(0.02, adapters)
    assert np.abs(whole.p).max() > 0.1 and not whole.lam.any()
    assert_trees_close(pulled(0.01, adapters), whole, rtol=1e-3, atol=1e-4)
    assert_trees_close(pulled(0.02, {"m": adapters["m"]}), whole, atol=1e-5)
