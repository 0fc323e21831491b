"""(IA)^3: gains by hand, on either side of a kernel, and what they learn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax.adapters import Ia3
from tests import differences, programs

KEY = jax.random.key(0)
AXES = lorax.Axes((0,), (1,))
IA3 = functools.partial(lorax.Target, "w", adapter="ia3")


def test_gains_by_hand():
    kernel = {"w": jnp.array([[2.0, 3.0], [5.0, 7.0]])}
    gain = jnp.array([10.0, 0.0])
    outputs = lorax.merge({"w": Ia3(AXES, gain=gain)}, kernel)["w"]
    inputs = lorax.merge({"w": Ia3(AXES, input_gain=gain)}, kernel)["w"]
    np.testing.assert_array_equal(outputs, [[20, 0], [50, 0]])
    np.testing.assert_array_equal(inputs, [[20, 30], [0, 0]])


@pytest.mark.parametrize("name,size", [("gain", 4), ("input_gain", 6)])
def test_kernel_and_gradient_are_those_of_the_equations(name, size):
    """With a bias and tanh after the kernel; a gain of zero learns too."""
    kernel, bias = programs.normal(0, 6, 4), programs.normal(1, 4)
    x, gain = programs.normal(2, 5, 6), programs.normal(3, size).at[1].set(0.0)
    wide = lambda v: np.asarray(v, np.float64)

    def loss(gain):
        w = wide(kernel) * (gain if name == "gain" else gain[:, None])
        return float(np.tanh(wide(x) @ w + wide(bias)).sum())

    fn = lambda params, x: jnp.sum(jnp.tanh(x @ params["w"] + params["bias"]))
    adapted = lorax.adapt(fn, on_merge="error")
    args = {"w": Ia3(AXES, **{name: gain})}, {"w": kernel, "bias": bias}, x
    value, gradient = jax.value_and_grad(adapted)(*args)
    np.testing.assert_allclose(value, loss(wide(gain)), rtol=1e-5)
    want = differences.gradient(loss, gain)
    np.testing.assert_allclose(getattr(gradient["w"], name), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("feedforward", [False, True])
def test_a_tied_kernel_has_its_gain_on_the_other_side(feedforward):
    params, x = {"w": programs.normal(0, 6, 4)}, programs.normal(1, 3, 4)
    gain = programs.normal(2, 6 if feedforward else 4)
    adapter = Ia3(AXES, **{"input_gain" if feedforward else "gain": gain})
    tied = lambda params, x: jnp.tanh(x @ params["w"].T) @ params["w"]
    got = lorax.adapt(tied, on_merge="error")({"w": adapter}, params, x)
    w = np.asarray(params["w"]) * (gain[:, None] if feedforward else gain)
    np.testing.assert_allclose(got, np.tanh(x @ w.T) @ w, rtol=1e-5, atol=1e-5)


def test_both_sides_at_once():
    kernel = programs.normal(0, 6, 4)
    gains = programs.normal(1, 4), programs.normal(2, 6)
    merged = Ia3(AXES, *gains).merge(kernel)
    np.testing.assert_allclose(merged, gains[1][:, None] * kernel * gains[0], 1e-5)


def test_an_embedding_has_gains_on_what_it_writes():
    params, ids = {"w": programs.normal(0, 6, 4)}, jnp.array([3, 1])
    fn = lambda params, ids: params["w"][ids]
    kernels = lorax.discover(fn, params, ids)
    adapters, params = lorax.init(KEY, params, IA3(), kernels)
    adapters = programs.perturbed(adapters)
    got = lorax.adapt(fn, on_merge="error")(adapters, params, ids)
    want = params["w"][ids] * adapters["w"].gain
    np.testing.assert_allclose(got, want, rtol=1e-6)
    with pytest.raises(ValueError, match="an embedding reads token ids"):
        lorax.init(KEY, params, IA3(options={"feedforward": True}), kernels)


def test_options_out_of_range_are_refused():
    params = {"w": jnp.ones((6, 4))}
    with pytest.raises(ValueError, match="feedforward=1 for adapter='ia3'; give True"):
        lorax.init(KEY, params, IA3(options={"feedforward": 1}))
    with pytest.raises(ValueError, match="has no option feed; it has feedforward"):
        lorax.init(KEY, params, IA3(options={"feed": True}))
    with pytest.raises(ValueError, match="has no branch to apply it to"):
        IA3(dropout=0.1)
