"""What Adam's state says, by hand and on a quadratic whose Hessian is known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax
from lorax import optim
from tests import programs


def test_one_step_by_hand():
    """Adam's first step is lr sign(g): RMS lr, cosine |g|_1 / (sqrt(n) |g|_2)."""
    params = {"bias": lorax.Full(jnp.zeros(2))}
    grads = {"bias": lorax.Full(jnp.array([3.0, -4.0]))}
    tx = optax.chain(optax.clip_by_global_norm(100.0), optax.adam(0.1))
    updates, state = tx.update(grads, tx.init(params), params)
    found = jax.jit(optim.adam_diagnostics)(updates, grads, state)
    np.testing.assert_allclose(found.update_rms, 0.1, rtol=1e-5)
    np.testing.assert_allclose(found.cosine, 7 / (2**0.5 * 5), rtol=1e-5)
    assert found.below_epsilon == 0
    curvature = np.array([3, 4]) / np.sqrt(12.5)
    np.testing.assert_allclose(found.curvature["bias"].value, curvature, rtol=1e-4)


def test_the_second_moment_reads_the_rows_of_the_hessian():
    h = programs.normal(0, 6, 6)
    h = h @ h.T  # not diagonal: rows, not the diagonal, are what it reads
    params, b2 = {"w": jnp.zeros(6)}, 0.9995
    tx = optax.adam(0.0, b2=b2)
    wander = jax.random.normal(jax.random.key(0), (4000, 6))

    def step(state, theta):
        grads = {"w": h @ theta}
        updates, state = tx.update(grads, state, params)
        return state, None

    state, _ = jax.lax.scan(step, tx.init(params), wander)
    grads = {"w": jnp.zeros(6)}
    found = optim.adam_diagnostics(grads, grads, state, b2=b2)
    rows = np.linalg.norm(h, axis=1)
    np.testing.assert_allclose(
        found.curvature["w"], rows / np.sqrt(np.mean(rows**2)), rtol=0.06
    )
    assert found.cosine == 0 == found.update_rms


def test_a_state_without_adam_is_refused():
    tx = optax.sgd(0.1)
    params = {"w": jnp.zeros(2)}
    with pytest.raises(ValueError, match="needs one ScaleByAdamState.*holds 0"):
        optim.adam_diagnostics(params, params, tx.init(params))
