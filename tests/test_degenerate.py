"""DoRA's gradients where a kernel or a magnitude degenerates, in every dtype and use.

The loss is linear in the outputs, `sum(t * y)`, so that the kernel's gradient is
exactly `x^T t` and the magnitude's can be computed by hand, in float64:

    v = w + s a b,   d m_j = sum_i (x^T t)_ij v_ij / c_j,   d v = (x^T t) m / c
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from tests import programs

IN, OUT, RANK, SCALE = 8, 6, 2, 0.5
AXES = lorax.Axes((0,), (1,))
# Reading off the gradient may lose three bits: 8 roundings of 2^-11, 2^-9 and 2^-24.
LIMIT = {"float16": 4e-3, "bfloat16": 1.6e-2, "float32": 1e-6}


def zero_column(w, b, m, bias):
    w[:, 2], m[2] = 0, 1e-19  # the norm that init gives such a column


def zero_row(w, b, m, bias):
    w[3] = 0


def zero_kernel(w, b, m, bias):
    w[:], m[:] = 0, 1e-3


def near_the_range(w, b, m, bias):
    w[:, 1] *= 3e4
    w[:, 4] *= 3e-6
    m[1], m[4] = 3e4, 3e-6


def zero_magnitude(w, b, m, bias):
    m[0], m[3] = 0, -1


def large_bias(w, b, m, bias):
    bias[1:4] = 300


def dead_column(w, b, m, bias):
    """A column of zeros in the kernel and in the factor."""
    w[:, 5], b[:, 5] = 0, 0


KINDS = [zero_column, zero_row, zero_kernel, near_the_range, zero_magnitude]
KINDS += [large_bias, dead_column]


def drawn(kind, dtype):
    """Float64 arrays whose values the dtype can represent."""
    draw = np.random.default_rng(0).normal
    w, b, bias = 0.3 * draw(size=(IN, OUT)), draw(size=(RANK, OUT)), draw(size=OUT)
    m = np.sqrt((w**2).sum(0)) * (1 + 0.1 * draw(size=OUT))
    kind(w, b, m, bias)
    x, t = draw(size=(16, IN)), draw(size=(16, OUT))
    if kind is near_the_range:  # w, x and their product stay within float16
        x, t = x / 64, t / 64
    rounded = lambda v: np.asarray(jnp.asarray(v, dtype), np.float64)
    single = lambda v: np.asarray(v, np.float32).astype(np.float64)
    a = draw(size=(IN, RANK))
    # factors enter in the kernel's dtype
    return *map(rounded, (w, x, t, bias, a, b)), single(m)


def adapter_of(a, b, m):
    return {
        "w": lorax.Dora(*(jnp.asarray(v, jnp.float32) for v in (a, b, m)), SCALE, AXES)
    }


def loss_of(biased):
    def loss(params, x, t):
        y = x @ params["w"] + (params["bias"] if biased else 0)
        return jnp.sum(y.astype(jnp.float32) * t)

    return loss


@functools.cache
def gradient(biased):
    return jax.jit(jax.grad(lorax.adapt(loss_of(biased), on_merge="error")))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", LIMIT)
def test_gradients_by_hand(dtype, biased, kind):
    w, x, t, bias, a, b, m = drawn(kind, dtype)
    params = {"w": jnp.asarray(w, dtype), "bias": jnp.asarray(bias, dtype)}
    args = jnp.asarray(x, dtype), jnp.asarray(t, jnp.float32)
    got = gradient(biased)(adapter_of(a, b, m), params, *args)["w"]

    v, dw = w + SCALE * a @ b, x.T @ t
    # a column of zeros has the norm that `column_norm` documents
    c = np.maximum(np.sqrt((v**2).sum(0)), np.sqrt(np.finfo(np.float32).tiny))
    dv = dw * m / c
    size = np.abs(dw).max() * np.abs(v).sum(0) / c  # size of the summed terms
    error = np.abs(np.asarray(got.magnitude, np.float64) - (dw * v / c).sum(0))
    assert (error <= LIMIT[dtype] * size + 1e-30).all(), error / size
    terms = SCALE * np.abs(dv) @ np.abs(b.T), SCALE * np.abs(a.T) @ np.abs(dv)
    wanted = SCALE * dv @ b.T, SCALE * a.T @ dv
    for own, want, term in zip((got.a, got.b), wanted, terms):
        error = np.abs(np.asarray(own, np.float64) - want)
        assert (error <= LIMIT[dtype] * term.max(0) + 1e-30).all(), error


def conv(params, x, t):
    return jax.lax.conv(x[:, :, None], params["w"].T[:, :, None], (1,), "VALID")[..., 0]


def lookup(params, x, t):
    return params["w"][jnp.arange(16) % IN]


def left(params, x, t):
    return (params["w"].T @ x.T).T


def tied(params, x, t):
    return x @ params["w"] + jnp.tanh(t.astype(x.dtype) @ params["w"].T) @ params["w"]


USES = [conv, lookup, left, tied]


@pytest.mark.parametrize("use", USES)
def test_other_uses_are_those_of_merge_in_float32(use):
    """With the same numbers: kernels in float16, then in float32 and merged."""

    def loss(params, x, t):
        return jnp.sum(use(params, x, t).astype(jnp.float32) * t)

    adapted = jax.jit(jax.grad(lorax.adapt(loss, on_merge="error")))
    merged = jax.jit(jax.grad(programs.definition(loss)))
    for kind in (zero_column, zero_magnitude, zero_kernel):
        w, x, t, _, a, b, m = drawn(kind, "float16")
        given = lambda dtype: (
            adapter_of(a, b, m),
            {"w": jnp.asarray(w, dtype)},
            jnp.asarray(x, dtype),
            jnp.asarray(t, jnp.float32),
        )
        got = adapted(*given(jnp.float16))["w"]
        want = merged(*given(jnp.float32))["w"]
        for name in ("a", "b", "magnitude"):
            own, wanted = (np.asarray(getattr(side, name)) for side in (got, want))
            size = np.abs(wanted).max(axis=-1, keepdims=True)
            assert (np.abs(own - wanted) <= 1e-2 * size + 1e-9).all(), (kind, name)


def test_per_example_gradients_of_a_degenerate_kernel():
    w, x, t, bias, a, b, m = drawn(zero_magnitude, "float32")
    params = {"w": jnp.asarray(w, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}
    rows = jnp.asarray(x, jnp.float32)[:, None], jnp.asarray(t, jnp.float32)[:, None]
    each = jax.vmap(jax.grad(lorax.adapt(loss_of(True))), (None, None, 0, 0))
    got = jax.jit(each)(adapter_of(a, b, m), params, *rows)["w"].magnitude
    v = w + SCALE * a @ b
    c = np.sqrt((v**2).sum(0))
    np.testing.assert_allclose(got, t * (x @ v) / c, rtol=1e-4, atol=1e-4)
