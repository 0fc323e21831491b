"""LoKr: Kronecker products by hand and by numpy; the program never forms them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax.adapters import LoKr, lokr
from tests import differences, programs

KEY = jax.random.key(0)
AXES = lorax.Axes((0,), (1,))
LOKR = functools.partial(lorax.Target, "w", adapter="lokr")


def test_a_product_by_hand():
    """[[1, 2]] (x) [[0], [3]] = [[0, 0], [3, 6]], twice."""
    adapter = LoKr(2.0, AXES, w1=jnp.array([[1.0, 2.0]]), w2=jnp.array([[0.0], [3.0]]))
    np.testing.assert_array_equal(adapter.delta(jnp.zeros((2, 2))), [[0, 0], [6, 12]])


FORMS = [
    (("w1", (3, 2)), ("w2", (4, 5))),
    (("w1_a", (3, 1)), ("w1_b", (1, 2)), ("w2", (4, 5))),
    (("w1", (3, 2)), ("w2_a", (4, 2)), ("w2_b", (2, 5))),
    (("w1_a", (3, 1)), ("w1_b", (1, 2)), ("w2_a", (4, 1)), ("w2_b", (1, 5))),
]


@pytest.mark.parametrize("form", FORMS, ids=["full", "thin w1", "thin w2", "thin"])
def test_kernel_and_gradient_are_those_of_numpy(form):
    arrays = {n: programs.normal(i, *shape) for i, (n, shape) in enumerate(form)}
    kernel, x = programs.normal(8, 12, 10), programs.normal(9, 5, 12)
    adapter = LoKr(1.5, AXES, **arrays)
    wide = {name: np.asarray(v, np.float64) for name, v in arrays.items()}
    either = lambda v, n: v[n] if n in v else v[n + "_a"] @ v[n + "_b"]
    update = lambda v: 1.5 * np.kron(either(v, "w1"), either(v, "w2"))
    np.testing.assert_allclose(adapter.delta(kernel), update(wide), atol=1e-5)

    def loss(name, at):
        w = np.asarray(kernel, np.float64) + update({**wide, name: at})
        return float(np.tanh(np.asarray(x, np.float64) @ w).sum())

    fn = lorax.adapt(lambda p, x: jnp.sum(jnp.tanh(x @ p["w"])), on_merge="error")
    gradient = jax.grad(fn)({"w": adapter}, {"w": kernel}, x)["w"]
    assert set(gradient.roles) == set(arrays)
    for name in arrays:
        want = differences.gradient(functools.partial(loss, name), arrays[name])
        np.testing.assert_allclose(getattr(gradient, name), want, atol=1e-4)


def test_a_tied_kernel_has_the_transposed_product():
    params, x = {"w": programs.normal(0, 6, 4)}, programs.normal(1, 3, 4)
    both = {"w1": programs.normal(2, 2, 2), "w2": programs.normal(3, 3, 2)}
    tied = lambda params, x: jnp.tanh(x @ params["w"].T) @ params["w"]
    adapters = {"w": LoKr(0.5, AXES, **both)}
    got = lorax.adapt(tied, on_merge="error")(adapters, params, x)
    w = params["w"] + 0.5 * np.kron(both["w1"], both["w2"])
    np.testing.assert_allclose(got, np.tanh(x @ w.T) @ w, rtol=1e-5, atol=1e-5)


def test_the_product_is_never_formed():
    """The gradient program has no array of the kernel's size but the kernel itself."""
    params, x = {"w": jnp.ones((64, 96))}, jnp.ones((4, 64))
    adapters, params = lorax.init(KEY, params, LOKR(rank=2))
    fn = lorax.adapt(lambda params, x: jnp.sum(jnp.tanh(x @ params["w"])))
    text = str(jax.make_jaxpr(jax.grad(fn))(adapters, params, x))
    sized = [line for line in text.splitlines() if "f32[64,96] = " in line]
    assert not [line for line in sized if "dot_general" in line or "mul" in line]


def test_the_start_is_that_of_peft():
    """w1 is zero; w2 is uniform within 1 / sqrt(fan-in): n, then the rank."""
    params = {"w": jnp.ones((4096, 1024))}
    adapter = lorax.init(KEY, params, LOKR(rank=4))[0]["w"]
    assert adapter.sides == ((64, 32), (64, 32)) and not adapter.w1.any()
    assert 0.98 / 8 < np.abs(adapter.w2_a).max() <= 1 / 8
    assert 0.98 / 2 < np.abs(adapter.w2_b).max() <= 1 / 2
    thin = lorax.init(KEY, params, LOKR(rank=4, options={"decompose_both": True}))[0]
    assert thin["w"].w1 is None and not thin["w"].w1_b.any()
    assert 0.98 / 8 < np.abs(thin["w"].w1_a).max() <= 1 / 8
    full = lorax.init(KEY, params, LOKR(rank=32))[0]["w"]
    assert full.w2.shape == (64, 32) and full.w2_a is None


@pytest.mark.parametrize(
    "size,factor,want",
    [
        (256, -1, (16, 16)),
        (128, -1, (8, 16)),
        (127, -1, (1, 127)),
        (128, 4, (4, 32)),
        (128, 64, (64, 2)),
        (768, 25, (24, 32)),
    ],
)
def test_sizes_are_split_as_in_lycoris(size, factor, want):
    """The first four are the examples in PEFT's docstring."""
    assert lokr.split(size, factor) == want


def test_what_cannot_be_is_refused():
    params = {"w": jnp.ones((6, 4))}
    with pytest.raises(ValueError, match="factor=0 for adapter='lokr'; give a whole"):
        lorax.init(KEY, params, LOKR(options={"factor": 0}))
    with pytest.raises(ValueError, match="decompose_both=2 for adapter='lokr'"):
        lorax.init(KEY, params, LOKR(options={"decompose_both": 2}))
    adapter = LoKr(1.0, AXES, w1=jnp.ones((2, 2)), w2=jnp.ones((2, 2)))
    with pytest.raises(ValueError, match=r"kernel \[4, 4\], but the leaf is \[6, 4\]"):
        lorax.merge({"w": adapter}, params)
    with pytest.raises(
        ValueError, match=r"LoKr has \['w1'\]; give w1, or w1_a and w1_b"
    ):
        lorax.merge({"w": LoKr(1.0, AXES, w1=jnp.ones((2, 2)))}, params)
    kernels = lorax.discover(lambda p, ids: p["w"][ids], params, jnp.arange(3))
    with pytest.raises(ValueError, match="an embedding reads token ids"):
        lorax.init(KEY, params, LOKR(), kernels)
