"""HRA: reflections by hand, one after the other in numpy, and their initialisation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax.adapters import Hra
from tests import differences, programs

KEY = jax.random.key(0)
AXES = lorax.Axes((0,), (1,))
HRA = functools.partial(lorax.Target, "w", adapter="hra")


def reflected(u, kernel, gram_schmidt=False):
    """`H_r ... H_1 W0`, one reflection at a time, in float64."""
    u, w = np.array(u, np.float64), np.asarray(kernel, np.float64)
    for i in range(u.shape[1]):
        if gram_schmidt:
            for j in range(i):
                u[:, i] -= u[:, j] * (u[:, j] @ u[:, i])
        u[:, i] /= np.linalg.norm(u[:, i])
        w = w - 2 * np.outer(u[:, i], u[:, i] @ w)
    return w


def test_two_reflections_by_hand():
    """First x1 -> -x1, then x1 <-> x2 (its normal is [1, -1])."""
    u = jnp.array([[3.0, 1.0], [0.0, -1.0]])
    kernel = {"w": jnp.array([[2.0, 3.0], [5.0, 7.0]])}
    merged = lorax.merge({"w": Hra(u, AXES)}, kernel)["w"]
    np.testing.assert_allclose(merged, [[5, 7], [-2, -3]], rtol=1e-6)


@pytest.mark.parametrize("gram_schmidt", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_kernel_and_gradient_are_those_of_the_equations(rank, gram_schmidt):
    u, kernel = programs.normal(0, 6, rank), programs.normal(1, 6, 4)
    weights = programs.normal(2, 6, 4)
    adapter = Hra(u, AXES, gram_schmidt=gram_schmidt)
    want = reflected(u, kernel, gram_schmidt)
    np.testing.assert_allclose(adapter.delta(kernel) + kernel, want, atol=5e-6)

    def loss(u):
        return float((np.asarray(weights) * reflected(u, kernel, gram_schmidt)).sum())

    fn = lorax.adapt(lambda params, x: x @ params["w"], on_merge="error")
    ours = lambda a: jnp.sum(weights * fn({"w": a}, {"w": kernel}, jnp.eye(6)))
    want = differences.gradient(loss, u)
    got = jax.grad(ours)(adapter).u
    np.testing.assert_allclose(got, want, atol=2e-5 * max(1, np.abs(want).max()))


def test_equal_pairs_cancel_and_learn():
    params = {"w": programs.normal(0, 16, 3)}
    adapters, params = lorax.init(KEY, params, HRA(rank=8))
    u = np.asarray(adapters["w"].u)
    np.testing.assert_array_equal(u[:, 0::2], u[:, 1::2])
    assert 0.4 < np.abs(u).max() <= 0.5
    merged = lorax.merge(adapters, params)["w"]
    np.testing.assert_allclose(merged, params["w"], atol=1e-6)
    loss = lorax.adapt(lambda params, x: jnp.sum(jnp.tanh(x @ params["w"])))
    gradient = jax.grad(loss)(adapters, params, programs.normal(1, 5, 16))["w"].u
    assert np.isfinite(gradient).all() and (np.abs(gradient).max(0) > 1e-3).all()


def test_a_zero_normal_reflects_nothing():
    u = programs.normal(0, 6, 3).at[:, 1].set(0.0)
    kernel = programs.normal(1, 6, 4)
    got = Hra(u, AXES).merge(kernel)
    want = reflected(np.delete(np.asarray(u), 1, 1), kernel)
    np.testing.assert_allclose(got, want, atol=2e-6)
    total = lambda u: jnp.sum(Hra(u, AXES).merge(kernel) ** 2)
    assert np.isfinite(jax.grad(total)(u)).all()


def test_a_tied_kernel_reflects_the_result():
    params, x = {"w": programs.normal(0, 6, 4)}, programs.normal(1, 3, 4)
    adapter = Hra(programs.normal(2, 6, 3), AXES)
    tied = lambda params, x: jnp.tanh(x @ params["w"].T) @ params["w"]
    got = lorax.adapt(tied, on_merge="error")({"w": adapter}, params, x)
    w = reflected(adapter.u, params["w"])
    np.testing.assert_allclose(got, np.tanh(x @ w.T) @ w, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_is_refused():
    params = {"w": jnp.ones((6, 4))}
    with pytest.raises(ValueError, match="rank=3 for adapter='hra'; give an even rank"):
        lorax.init(KEY, params, HRA(rank=3))
    with pytest.raises(ValueError, match="no init that leaves the kernel unchanged"):
        lorax.init(KEY, params, HRA(rank=2, options={"gram_schmidt": True}))
    with pytest.raises(ValueError, match="gram_schmidt=0 for adapter='hra'"):
        lorax.init(KEY, params, HRA(rank=2, options={"gram_schmidt": 0}))
    kernels = lorax.discover(lambda p, ids: p["w"][ids], params, jnp.arange(3))
    with pytest.raises(ValueError, match="an embedding reads token ids"):
        lorax.init(KEY, params, HRA(rank=2), kernels)
    assert lorax.init(KEY, params, HRA(rank=6))[0]["w"].u.shape == (6, 6)
