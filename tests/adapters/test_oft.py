"""OFT: a rotation by hand, the Cayley transform in numpy, and its use in programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax.adapters import Oft, oft
from tests import differences, programs

KEY = jax.random.key(0)
AXES = lorax.Axes((0,), (1,))
OFT = functools.partial(lorax.Target, "w", adapter="oft")


def rotation(skew, size, terms):
    """R of one block in numpy: the inverse, or the series of OFTv2, term by term."""
    q = np.zeros((size, size))
    entry = iter(np.asarray(skew, np.float64))
    for i in range(size):
        for j in range(i + 1, size):
            q[i, j] = next(entry)
            q[j, i] = -q[i, j]
    if terms is None:
        return (np.eye(size) + q) @ np.linalg.inv(np.eye(size) - q)
    neumann = sum(np.linalg.matrix_power(q, i) for i in range(terms - 1))
    return (np.eye(size) + q) @ neumann


def turned_kernel(skew, kernel, size, terms, eps=None):
    """`diag(R_1, ..) W0`; a single block in `skew` rotates all parts."""
    skew = np.asarray(skew, np.float64)
    if eps is not None:
        bound = eps / np.sqrt(len(skew))
        norms = np.sqrt(2 * (skew**2).sum(1, keepdims=True))
        skew = skew * np.minimum(1, bound / norms)
    kernel = np.asarray(kernel, np.float64)
    count = len(kernel) // size
    found = np.zeros_like(kernel)
    for i in range(count):
        part = slice(i * size, (i + 1) * size)
        found[part] = rotation(skew[i % len(skew)], size, terms) @ kernel[part]
    return found


def test_a_quarter_turn_by_hand():
    """Q = [[0, 1], [-1, 0]]: (I + Q) (I - Q)^-1 = [[0, 1], [-1, 0]]."""
    adapter = Oft(jnp.array([[1.0]]), AXES, cayley_terms=None)
    kernel = jnp.array([[2.0, 3.0], [5.0, 7.0]])
    merged = lorax.merge({"w": adapter}, {"w": kernel})["w"]
    np.testing.assert_allclose(merged, [[5, 7], [-2, -3]], rtol=1e-6)


def test_the_series_by_hand():
    """Q^2 = -t^2 I: I + 2 Q + 2 Q^2 + Q^3 is [[1 - 2 t^2, 2 t - t^3], ..]."""
    adapter = Oft(jnp.array([[0.5]]), AXES, cayley_terms=4)
    merged = lorax.merge({"w": adapter}, {"w": jnp.eye(2)})["w"]
    np.testing.assert_allclose(merged, [[0.5, 0.875], [-0.875, 0.5]], rtol=1e-6)


@pytest.mark.parametrize(
    "terms,blocks,eps",
    [(2, 3, None), (5, 3, None), (5, 1, 0.5), (None, 3, 0.5), (None, 1, None)],
)
def test_kernel_and_gradient_are_those_of_the_equations(terms, blocks, eps):
    size, skew = 4, 0.3 * programs.normal(1, blocks, 6)
    kernel, weights = programs.normal(2, 12, 5), programs.normal(3, 12, 5)
    adapter = Oft(skew, AXES, cayley_terms=terms, eps=eps)
    want = turned_kernel(skew, kernel, size, terms, eps)
    np.testing.assert_allclose(adapter.delta(kernel), want - kernel, atol=2e-6)

    def loss(skew):
        turned = turned_kernel(skew, kernel, size, terms, eps)
        return float((np.asarray(weights) * turned).sum())

    fn = lorax.adapt(lambda params, x: x @ params["w"], on_merge="error")
    ours = lambda a: jnp.sum(weights * fn({"w": a}, {"w": kernel}, jnp.eye(12)))
    expected = differences.gradient(loss, skew)
    np.testing.assert_allclose(jax.grad(ours)(adapter).skew, expected, atol=2e-5)


def test_the_inverse_is_orthogonal_and_the_series_nearly():
    skew = 0.1 * programs.normal(0, 2, 6)
    away = []
    for terms in (None, 8, 5, 3):
        turn = jnp.eye(4) + oft.cayley(oft.skew_symmetric(skew, 4), terms)
        away.append(np.abs(turn.mT @ turn - np.eye(4)).max())
    assert away[0] < 1e-6 and away[1] < 1e-5 and away[0] <= away[1] < away[2] < away[3]


def test_at_zero_nothing_turns_and_everything_learns():
    """The gradient of coft's bound takes no square root at zero."""
    params = {"w": programs.normal(0, 8, 3)}
    target = OFT(options={"block_size": 4, "coft": True, "cayley_terms": None})
    adapters, params = lorax.init(KEY, params, target)
    loss = lorax.adapt(lambda params, x: jnp.sum(jnp.tanh(x @ params["w"])))
    np.testing.assert_array_equal(lorax.merge(adapters, params)["w"], params["w"])
    gradient = jax.grad(loss)(adapters, params, programs.normal(1, 5, 8))["w"].skew
    assert np.isfinite(gradient).all() and (np.abs(gradient) > 1e-4).all()


def test_constrained_blocks_stay_within_the_bound():
    skew = programs.normal(0, 4, 6)
    inside = oft.bounded(skew, 0.01)
    norms = np.sqrt((oft.skew_symmetric(inside, 4) ** 2).sum((-1, -2)))
    np.testing.assert_allclose(norms, 0.01, rtol=1e-5)
    np.testing.assert_array_equal(oft.bounded(0.001 * skew, 1.0), 0.001 * skew)


def test_a_tied_kernel_turns_the_result():
    """x W0^T R^T where the kernel is used transposed."""
    params, x = {"w": programs.normal(0, 6, 4)}, programs.normal(1, 3, 4)
    adapter = Oft(0.3 * programs.normal(2, 2, 3), AXES)
    tied = lambda params, x: jnp.tanh(x @ params["w"].T) @ params["w"]
    got = lorax.adapt(tied, on_merge="error")({"w": adapter}, params, x)
    w = turned_kernel(adapter.skew, params["w"], 3, 5)
    np.testing.assert_allclose(got, np.tanh(x @ w.T) @ w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options,message",
    [
        (
            {"block_size": 1},
            r"block_size=1 for adapter='oft'; give a whole number >= 2",
        ),
        ({"block_size": 2.0}, r"block_size=2.0 .* whole number"),
        ({"cayley_terms": 1}, r"cayley_terms=1 .* >= 2, or None for the inverse"),
        ({"cayley_terms": True}, r"cayley_terms=True"),
        ({"eps": 0.0}, r"eps=0.0 .* a number > 0"),
        ({"coft": 1}, r"coft=1 .* True or False"),
        ({"block_share": "yes"}, r"block_share='yes'"),
        ({"blocks": 3}, r"has no option blocks; it has block_share, block_size, cay"),
        ({}, r"w: block_size=32 does not divide the 12 inputs; .* \[3, 4, 6, 12\]"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lorax.init(KEY, {"w": jnp.ones((12, 4))}, OFT(options=options))


def test_what_has_no_inputs_to_turn_is_refused():
    params = {"w": jnp.ones((12, 4))}
    kernels = lorax.discover(lambda p, ids: p["w"][ids], params, jnp.arange(3))
    with pytest.raises(ValueError, match="an embedding reads token ids"):
        lorax.init(KEY, params, OFT(options={"block_size": 4}), kernels)
    with pytest.raises(ValueError, match="has no branch to apply it to"):
        OFT(dropout=0.1)


def test_blocks_of_another_model_are_refused():
    adapter = Oft(jnp.zeros((2, 3)), AXES)
    with pytest.raises(ValueError, match="2 blocks of 3 entries do not fit 8 inputs"):
        lorax.merge({"w": adapter}, {"w": jnp.ones((8, 2))})
    with pytest.raises(ValueError, match="2 blocks of 4 entries"):
        lorax.merge({"w": Oft(jnp.zeros((2, 4)), AXES)}, {"w": jnp.ones((6, 2))})
