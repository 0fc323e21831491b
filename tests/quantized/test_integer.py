"""W8A8: integer products, compared with numpy's integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax.quantized import Int8
from tests import programs
from tests.quantized.test_adapt import close, dense

KEY = jax.random.key(0)


def rounded(x, axis):
    """Codes and scales in numpy's float32, with a token's rounding."""
    scale = np.abs(x).max(axis, keepdims=True) / np.float32(127)
    return np.round(x / scale).astype(np.int64), scale


@pytest.mark.parametrize("side", ["right", "left", "heads out", "heads in", "stack"])
def test_a_product_is_that_of_integers(side):
    x = np.asarray(programs.normal(0, 6, 32))
    if side in ("right", "left"):
        shape, axes = (32, 24), lorax.Axes((0,), (1,))
        fn = lambda p, x: x @ p["w"]
        if side == "left":  # the kernel is the first operand
            fn = lambda p, x: jnp.einsum("io,ti->ot", p["w"], x).T
    elif side == "heads out":
        shape, axes = (32, 4, 6), lorax.Axes((0,), (1, 2))
        fn = lambda p, x: jnp.einsum("ti,ihd->thd", x, p["w"]).reshape(6, 24)
    elif side == "heads in":
        shape, axes = (4, 8, 24), lorax.Axes((0, 1), (2,))
        fn = lambda p, x: jnp.einsum("thd,hdo->to", x.reshape(6, 4, 8), p["w"])
    else:
        shape, axes = (3, 32, 24), lorax.Axes((1,), (2,), (0,))
        fn = lambda p, x: jnp.einsum("eti,eio->eto", jnp.stack([x] * 3), p["w"])
    leaf = Int8(activations=True).quantize(programs.normal(1, *shape), axes)
    codes = np.asarray(leaf.codes, np.int64).reshape(-1, 32, 24)
    scales = np.asarray(leaf.scales).reshape(-1, 1, 24)
    q, s = rounded(x, -1)
    want = (q @ codes).astype(np.float32) * s * scales
    got = np.asarray(lorax.adapt(fn)({}, {"w": leaf}, x)).reshape(want.shape)
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-6)
    text = str(jax.make_jaxpr(lorax.adapt(fn))({}, {"w": leaf}, x))
    assert "preferred_element_type=int32" in text


def test_the_gradient_passes_rounding_by_and_branches_read_what_is_given():
    params = {"w": programs.normal(0, 32, 24), "v": programs.normal(1, 24, 8)}

    def fn(params, x):
        return jnp.sum(jnp.sin(jnp.arange(8.0)) * ((x @ params["w"]) @ params["v"]))

    x = programs.normal(2, 6, 32)
    base = lorax.quantize(params, [("w|v", "w8a8")])
    adapters = programs.perturbed(lorax.init(KEY, base, [("w|v", 2)])[0])
    adapted = lorax.adapt(fn)
    # linear in all but the input of the second adapter, which is the first product
    got = jax.jit(jax.grad(adapted))(adapters, base, x)
    want = jax.grad(adapted)(adapters, dense(base), x)
    close(got["w"], want["w"], 1e-6)
    close(
        jax.grad(adapted, 2)(adapters, base, x),
        jax.grad(adapted, 2)(adapters, dense(base), x),
    )
    first = jnp.asarray(lorax.adapt(lambda p, x: x @ p["w"])(adapters, base, x))
    exact = lorax.adapt(lambda p, x: x @ p["w"])(adapters, dense(base), x)
    off = jnp.linalg.norm(first - exact) / jnp.linalg.norm(exact)
    assert 1e-4 < float(off) < 0.02  # one part in 127 of each entry, at random
    close(adapted({}, base, x), fn(dense(base), x), 0.05)


def test_in_a_scan_and_a_transposed_use_decodes():
    stack = {"w": programs.normal(0, 3, 32, 32)}

    def fn(params, x):
        body = lambda x, w: (jnp.tanh(x @ w), None)
        x, _ = jax.lax.scan(body, x, params["w"])
        return x @ params["w"][0].T

    x = programs.normal(1, 4, 32)
    kernels = lorax.discover(fn, stack, x)
    base = lorax.quantize(stack, [("w", "w8a8")], kernels)
    text = str(jax.make_jaxpr(lorax.adapt(fn))({}, base, x))
    assert text.count("preferred_element_type=int32") == 1
    close(jax.jit(lorax.adapt(fn))({}, base, x), fn(dense(base), x), 0.05)


def test_groups_have_no_product_of_integers():
    with pytest.raises(ValueError, match=r"Int8\(group=64, activations=True\): a sum"):
        Int8(group=64, activations=True)
