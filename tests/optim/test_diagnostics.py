"""Adam's diagnostics: by hand, and for parameters wandering around a minimum."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax
from lorax import optim

AXES = lorax.Axes((0,), (1,))


def lora(a, b):
    return lorax.Lora(jnp.asarray(a), jnp.asarray(b), 1.0, AXES)


ADAPTERS = {
    "w": lora(np.zeros((2, 1), "f"), np.zeros((1, 2), "f")),
    "head": lorax.Full(jnp.zeros(1)),
}
# half of a's gradient is below epsilon
GRADS = {"w": lora([[3e-9], [4.0]], [[0.0, 2.0]]), "head": lorax.Full(jnp.array([1.0]))}


def test_one_step_by_hand():
    tx = optax.adam(0.1)
    updates, state = tx.update(GRADS, tx.init(ADAPTERS))
    info = jax.jit(optim.adam_diagnostics)(GRADS, updates, state)
    assert set(info) == {"all", "a", "b", "value"}
    # u = -0.1 g / (|g| + 1e-8): 3e-9 / 1.3e-8 and 1 in a, 0 and 1 in b
    small = 3 / 13
    got = info["a"]
    rms = 0.1 * np.sqrt((small**2 + 1) / 2)
    assert float(got.update_rms) == pytest.approx(rms, rel=1e-5)
    assert float(got.descent_cosine) == pytest.approx(1 / np.hypot(small, 1), rel=1e-5)
    assert float(got.below_epsilon) == 0.5 == float(info["b"].below_epsilon)
    assert float(got.root_v) == pytest.approx(4 / np.sqrt(2), rel=1e-5)
    whole = info["all"]
    assert float(whole.below_epsilon) == pytest.approx(2 / 5)
    assert float(whole.root_v) == pytest.approx(np.sqrt((16 + 4 + 1) / 5), rel=1e-5)
    cosine = (4 + 2 + 1) / (np.sqrt(16 + 4 + 1) * np.sqrt(small**2 + 3))
    assert float(whole.descent_cosine) == pytest.approx(cosine, rel=1e-5)


def test_nothing_moves_where_there_is_no_gradient():
    tx = optax.adam(0.1)
    zeros = jax.tree.map(jnp.zeros_like, ADAPTERS)
    updates, state = tx.update(zeros, tx.init(ADAPTERS))
    info = optim.adam_diagnostics(zeros, updates, state)["all"]
    assert [float(x) for x in info] == [0, 0, 1, 0]


def test_a_partition_is_read_leaf_by_leaf():
    """LoRA+ and similar: one Adam per label, and leaves that none trains."""
    labels = {
        "w": lorax.Lora("slow", "fast", 1.0, AXES),
        "head": lorax.Full("none"),
    }
    parts = {"slow": optax.adam(0.1), "fast": optax.adam(0.4), "none": optax.sgd(0.1)}
    tx = optax.partition(parts, labels)
    updates, state = tx.update(GRADS, tx.init(ADAPTERS), ADAPTERS)
    info = optim.adam_diagnostics(GRADS, updates, state)
    assert set(info) == {"all", "a", "b"}
    assert float(info["b"].update_rms) == pytest.approx(0.4 / np.sqrt(2), rel=1e-5)
    rows = optim.hessian_row_norms(ADAPTERS, state, wander=2.0)
    np.testing.assert_allclose(rows["w"].a, [[1.5e-9], [2.0]], rtol=1e-5)
    np.testing.assert_allclose(rows["w"].b, [[0.0, 1.0]], rtol=1e-5)
    assert np.isnan(rows["head"].value).all()


@pytest.mark.parametrize("diagonal", [True, False])
def test_the_second_moment_is_the_norm_of_a_row_of_the_hessian(diagonal):
    rng = np.random.default_rng(0)
    root = rng.standard_normal((6, 6))
    hessian = root @ root.T / 6
    if diagonal:
        hessian = np.diag(np.diag(hessian))
    wander, b2, steps = 0.3, 0.9995, 20_000
    tx = optax.scale_by_adam(b2=b2)
    adapters = {"x": lorax.Full(jnp.zeros(6))}
    theta = wander * rng.standard_normal((steps, 6))
    gradients = jnp.asarray(theta @ hessian, jnp.float32)

    @jax.jit
    def state_after(gradients):
        step = lambda state, g: (tx.update({"x": lorax.Full(g)}, state)[1], None)
        return jax.lax.scan(step, tx.init(adapters), gradients)[0]

    state = state_after(gradients)
    rows = optim.hessian_row_norms(adapters, state, wander, b2=b2)["x"].value
    norms = np.linalg.norm(hessian, axis=1)
    # v averages g^2 with relative variance 2 (1 - b2) / (1 + b2); its root has half
    error = 5 * 0.5 * np.sqrt(2 * (1 - b2) / (1 + b2))
    assert error < 0.06
    np.testing.assert_allclose(rows, norms, rtol=error)
    away = np.abs(np.diag(hessian)) / norms
    assert diagonal == bool((away > 1 - error).all())  # not |H_ii| in general


def test_what_cannot_be_read_is_refused():
    sgd = optax.sgd(0.1).init(ADAPTERS)
    with pytest.raises(ValueError, match="no optax.ScaleByAdamState over adapters"):
        optim.adam_diagnostics(GRADS, GRADS, sgd)
    state = optax.adam(0.1).init(ADAPTERS)
    with pytest.raises(ValueError, match="two Adams train its"):
        optim.adam_diagnostics(GRADS, GRADS, (state, state))
    with pytest.raises(ValueError, match="wander=0; give a standard deviation"):
        optim.hessian_row_norms(ADAPTERS, state, 0)
    with pytest.raises(ValueError, match="b2=1.0; give the optimiser's"):
        optim.hessian_row_norms(ADAPTERS, state, 1.0, b2=1.0)
