"""Decompositions against numpy's, in float64."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax import linalg
from tests import programs


def spectrum(n, m, power, seed=0):
    """A matrix with singular values i^-power."""
    rng = np.random.default_rng(seed)
    k = min(n, m)
    u, v = (np.linalg.qr(rng.standard_normal((d, k)))[0] for d in (n, m))
    s = np.arange(1, k + 1) ** -float(power)
    return jnp.asarray((u * s) @ v.T, jnp.float32), s


def captured(matrix, u):
    """The share of the squared norm in the span of u."""
    matrix, u = np.asarray(matrix, np.float64), np.asarray(u, np.float64)
    return np.linalg.norm(u.T @ matrix) ** 2 / np.linalg.norm(matrix) ** 2


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("n,m", [(7, 5), (5, 7)])
def test_the_exact_decomposition(batch, n, m):
    matrix = programs.normal(0, *batch, n, m)
    u, s, vt = linalg.svd(matrix, 3)
    want = np.linalg.svd(np.asarray(matrix, np.float64))
    np.testing.assert_allclose(s, want[1][..., :3], rtol=1e-5)
    best = want[0][..., :3] * want[1][..., None, :3] @ want[2][..., :3, :]
    np.testing.assert_allclose(u * s[..., None, :] @ vt, best, atol=1e-5)


@pytest.mark.parametrize("name", ["svd", "randomized_svd", "low_rank_svd"])
def test_signs_are_fixed(name):
    a, b = programs.normal(1, 8, 3), programs.normal(2, 3, 6)
    made = {
        "svd": lambda a: linalg.svd(a @ b, 3),
        "randomized_svd": lambda a: linalg.randomized_svd(jax.random.key(0), a @ b, 3),
        "low_rank_svd": lambda a: linalg.low_rank_svd(a, b),
    }[name]
    one, other = made(a), made(-a)
    largest = np.take_along_axis(one[0], np.abs(one[0]).argmax(0)[None], 0)
    assert (largest > 0).all()
    np.testing.assert_allclose(one[0], other[0], atol=1e-5)
    np.testing.assert_allclose(one[2], -other[2], atol=1e-5)


@pytest.mark.parametrize("power", [0.5, 1, 2])
def test_the_randomised_one_captures_what_the_exact_one_does(power):
    matrix, s = spectrum(96, 64, power)
    u, got, vt = linalg.randomized_svd(jax.random.key(0), matrix, 8)
    np.testing.assert_allclose(u.T @ u, np.eye(8), atol=1e-5)
    np.testing.assert_allclose(vt @ vt.T, np.eye(8), atol=1e-5)
    np.testing.assert_allclose(got, s[:8], rtol=0.01)
    best = np.sum(s[:8] ** 2) / np.sum(s**2)
    assert captured(matrix, u) >= 0.999 * best


def test_a_batch_and_half_precision():
    matrix = programs.normal(0, 3, 9, 7).astype(jnp.bfloat16)
    u, s, vt = linalg.randomized_svd(jax.random.key(0), matrix, 2, oversample=5)
    assert (u.shape, s.shape, vt.shape) == ((3, 9, 2), (3, 2), (3, 2, 7))
    assert u.dtype == s.dtype == jnp.float32
    want = np.linalg.svd(np.asarray(matrix, np.float64))[1][:, :2]
    np.testing.assert_allclose(s, want, rtol=1e-4)


@pytest.mark.parametrize("batch,rank", [((), 3), ((2,), 3), ((), 7)])
def test_the_decomposition_of_a_product(batch, rank):
    a, b = programs.normal(1, *batch, 8, rank), programs.normal(2, *batch, rank, 6)
    u, s, vt = linalg.low_rank_svd(a, b)
    dense = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    want = np.linalg.svd(dense)[1][..., : min(rank, 6)]
    np.testing.assert_allclose(s, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(u * s[..., None, :] @ vt, dense, atol=1e-5)
    zero = linalg.low_rank_svd(a, 0 * b)
    assert all(np.isfinite(part).all() for part in zero)


def test_a_rank_above_the_matrix_is_refused():
    with pytest.raises(AssertionError, match="4"):
        linalg.randomized_svd(jax.random.key(0), jnp.ones((5, 3)), 4)


@pytest.mark.slow
def test_a_large_kernel_takes_seconds():
    """4096 x 4096: 0.99 of the exact energy in under 5 s on two cores."""
    matrix, s = spectrum(4096, 4096, 0.5)
    run = jax.jit(lambda key, m: linalg.randomized_svd(key, m, 16))
    jax.block_until_ready(run(jax.random.key(0), matrix))
    began = time.perf_counter()
    u, _, _ = jax.block_until_ready(run(jax.random.key(1), matrix))
    seconds = time.perf_counter() - began
    share = captured(matrix, u) / (np.sum(s[:16] ** 2) / np.sum(s**2))
    print(f"{seconds:.2f} s, {share:.4f} of the exact energy")
    assert seconds < 5 and share >= 0.99
