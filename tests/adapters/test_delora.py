"""DeLoRA: the bounded sum in numpy, gradients by finite differences, its init."""

import jax
import jax.numpy as jnp
import numpy as np

import lorax
from tests.adapters import reference

TARGET = lorax.Target("w", rank=2, alpha=3, adapter="delora")


def update(fields, kernel):
    """Term k: lam / r times an outer product of unit vectors, scaled by row norms."""
    total = np.zeros_like(kernel)
    a, b, lam = fields["a"], fields["b"], fields["lam"]
    for k in range(a.shape[1]):
        one, two = a[:, k], b[k]
        size = lam / a.shape[1] / np.linalg.norm(one) / np.linalg.norm(two)
        total += size * np.outer(one, two)
    return np.linalg.norm(kernel, axis=1)[:, None] * total


def test_update_by_hand_and_gradients_by_differences():
    case = reference.case(TARGET)
    reference.assert_close(case.delta, update(case.fields, case.kernel), 1e-5)
    step, expected = 1e-6, {}
    for name, field in case.fields.items():
        slopes = np.zeros(field.size)
        for i in range(field.size):
            sides = []
            for sign in (1, -1):
                moved = field.reshape(-1).copy()
                moved[i] += sign * step
                fields = {**case.fields, name: moved.reshape(field.shape)}
                sides.append(np.sum(case.cotangent * update(fields, case.kernel)))
            slopes[i] = (sides[0] - sides[1]) / (2 * step)
        expected[name] = slopes.reshape(field.shape)
    reference.assert_gradients(case, expected)


def test_lam_bounds_the_update():
    case = reference.case(TARGET, size=30.0)
    norms = np.linalg.norm(case.kernel, axis=1)
    assert np.linalg.norm(case.delta / norms[:, None]) <= abs(case.fields["lam"])


def test_the_start_trains_without_nan():
    params = {"w": jnp.ones((9, 5))}
    adapters, params = lorax.init(jax.random.key(0), params, TARGET)
    assert adapters["w"].lam == 3 and not adapters["w"].b.any()
    x = jnp.arange(9.0) / 50
    loss = lorax.adapt(lambda params: jnp.sum(jnp.tanh(x @ params["w"])))
    grads = jax.grad(loss)(adapters, params)["w"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert grads.b.any() and not grads.lam.any()
