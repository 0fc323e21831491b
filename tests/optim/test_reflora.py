"""RefLoRA against explicitly refactored factors, in numpy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorax import optim
from lorax.adapters import Lora
from lorax.optim import _pairs, _reflora
from tests.optim import problems

N, M, R, S = 9, 7, 3, 1.5


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


DRAW = np.random.default_rng(0).normal
A, B, G = DRAW(size=(N, R)), 0.1 * DRAW(size=(R, M)), DRAW(size=(N, M))


def lora(a, b):
    return Lora(jnp.asarray(a), jnp.asarray(b), S, problems.DENSE)


def step(a, b, damping=0.0, rate=0.1):
    """The factors after one step of gradient descent."""
    w, grads = {"w": lora(a, b)}, {"w": lora(S * G @ b.T, S * a.T @ G)}
    tx = optax.chain(optim.scale_by_reflora(damping), optax.sgd(rate))
    new = optax.apply_updates(w, tx.update(grads, tx.init(w), w)[0])["w"]
    return np.asarray(new.a), np.asarray(new.b)


def balanced():
    """The factors of A B with equal Gram matrices, from its singular values."""
    u, s, vt = np.linalg.svd(A @ B)
    return u[:, :R] * np.sqrt(s[:R]), np.sqrt(s[:R, None]) * vt[:R]


def test_the_product_steps_as_that_of_the_balanced_factors():
    """To all orders: numpy refactors the factors and steps them."""
    a, b = balanced()
    rate = 0.1
    want = (a - rate * S * G @ b.T) @ (b - rate * S * a.T @ G)
    new_a, new_b = step(A, B)
    np.testing.assert_allclose(new_a @ new_b, want, rtol=1e-9, atol=1e-10)
    plain = (A - rate * S * G @ B.T) @ (B - rate * S * A.T @ G)
    assert np.abs(plain - want).max() > 0.1


@pytest.mark.parametrize("kind", ["orthogonal", "general"])
def test_the_step_of_the_product_does_not_depend_on_the_gauge(kind):
    t = np.random.default_rng(1).normal(size=(R, R))
    t = np.linalg.qr(t)[0] if kind == "orthogonal" else t
    one, other = step(A, B), step(A @ t, np.linalg.solve(t, B))
    np.testing.assert_allclose(other[0] @ other[1], one[0] @ one[1], atol=1e-10)


def test_s_is_the_geometric_mean_and_balanced_factors_are_the_smallest():
    pair = _pairs.pair_of(lora(A, B))
    s, inverse = (np.asarray(x[0]) for x in _reflora.balance(pair, 0.0))
    np.testing.assert_allclose(s @ (A.T @ A) @ s, B @ B.T, atol=1e-10)
    np.testing.assert_allclose(s @ inverse, np.eye(R), atol=1e-8)
    size = lambda p: np.sum((A @ p) ** 2) + np.sum(np.linalg.solve(p, B) ** 2)
    values, vectors = np.linalg.eigh(s)
    best = size(vectors * np.sqrt(values))
    np.testing.assert_allclose(best, 2 * np.linalg.svd(A @ B)[1].sum(), rtol=1e-9)
    for seed in range(20):
        near = np.eye(R) + 0.1 * np.random.default_rng(seed).normal(size=(R, R))
        assert size(vectors * np.sqrt(values) @ near) > best


def test_damping_by_numpy():
    """Both Gram matrices get the same d, a share of the larger trace."""
    d = 0.1 * max(np.sum(A**2), np.sum(B**2)) / R
    n, m = A.T @ A + d * np.eye(R), B @ B.T + d * np.eye(R)
    s = np.asarray(_reflora.balance(_pairs.pair_of(lora(A, B)), 0.1)[0][0])
    np.testing.assert_allclose(s @ n @ s, m, atol=1e-10)


def test_b_leaves_zero_where_it_is_damped():
    """S is then the root of d (N + d I)^-1."""
    zero = np.zeros_like(B)
    a, b = step(A, zero, damping=0.01)
    np.testing.assert_array_equal(a, A)
    d = 0.01 * np.sum(A**2) / R
    values, vectors = np.linalg.eigh(A.T @ A + d * np.eye(R))
    s = vectors * np.sqrt(d / values) @ vectors.T
    np.testing.assert_allclose(b, -0.1 * s @ (S * A.T @ G), rtol=1e-9)
    assert not step(A, zero, damping=0.0)[1].any()


def test_errors():
    with pytest.raises(ValueError, match="damping=-1.0; give a number of at least"):
        optim.reflora(0.1, damping=-1.0)
    with pytest.raises(ValueError, match="w: .* the p, lam, q of AdaLora"):
        optim.reflora(0.1).init({"w": problems.adalora()})
