"""Adam's epsilon: moments of a step by hand, the best rate against Monte Carlo."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax import scaling

RATIOS = {  # signal over single-example noise, for 24 parameters
    "alike": np.full(24, 0.1),
    "spread": np.exp(1.5 * np.random.default_rng(3).standard_normal(24) - 2),
    "two kinds": np.repeat([3.0, 0.003], 12),
    "half dead": np.repeat([0.3, 1e-6], 12),
}
EPSILONS = (0.0, 1e-4, 0.02, 0.3, 10.0)
BATCHES = (1, 8, 64, 512, 8192)


def softsign(x, eps):
    return np.sign(x) if eps == 0 else x / np.sqrt(x**2 + eps**2)


def problem(kind):
    """A gradient, single-example deviations, a Hessian with a common direction."""
    rng = np.random.default_rng(0)
    sigma = np.exp(0.5 * rng.standard_normal(24))
    g = RATIOS[kind] * sigma * rng.choice([-1, 1], 24)
    root = rng.standard_normal((24, 24)) / np.sqrt(24)
    return g, sigma, 0.3 * root @ root.T + 0.1 * np.outer(g, g) + 0.5 * np.eye(24)


def steps(g, sigma, batch, eps, draws=20_000):
    """Steps `[draws, n]` for pairs of batches with opposite noise."""
    noise = np.random.default_rng(1).standard_normal((draws // 2, g.size))
    noise = np.concatenate([noise, -noise])
    return softsign(g + sigma / np.sqrt(batch) * noise, eps)


def closed_form(g, sigma, hessian, batch, eps):
    """The rate by the closed forms that the module gives."""
    t2 = sigma**2 / batch
    mean = g / np.sqrt(g**2 + eps**2 + math.pi * t2 / 2)
    square = (g**2 + t2) / (g**2 + t2 + eps**2)
    noise = np.diag(hessian) * np.maximum(square - mean**2, 0)
    return mean @ g / (mean @ hessian @ mean + noise.sum())


@pytest.mark.parametrize("kind", RATIOS)
def test_the_rate_and_the_shrinkage_against_monte_carlo(kind):
    """25 pairs of epsilon and batch each, against the documented closed form."""
    g, sigma, hessian = problem(kind)
    for eps, batch in itertools.product(EPSILONS, BATCHES):
        u = steps(g, sigma, batch, eps)
        want = u.mean(0) @ g / np.mean(np.sum(u @ hessian * u, -1))
        got = scaling.adam_epsilon_learning_rate(g, sigma, hessian, batch, eps)
        assert float(got) == pytest.approx(want, rel=0.03), (eps, batch)
        assert abs(math.log(closed_form(g, sigma, hessian, batch, eps) / want)) < (
            math.log(1.4)
        )
        beta = scaling.adam_epsilon_shrinkage(g, sigma, batch, eps)
        spread = u.std(0) / math.sqrt(len(u))  # of the mean; opposite noise helps
        away = np.abs(beta * softsign(g, eps) - u.mean(0))
        rare = 20 / len(u)  # a sign that no draw flipped has no spread
        assert (away < 5 * spread + rare).all(), (eps, batch)


@pytest.mark.parametrize(
    ("g", "t", "eps", "mean"),
    [
        (3.0, 0.0, 4.0, 0.6),  # no noise: 3 / 5
        (-2.0, 2.0, 0.0, -0.6826894921),  # the sign: a normal number within one sigma
        (1.0, 3.0, 0.5, 0.2538260935),  # by scipy's Faddeeva function and quadrature
        (1e-3, 1e-3, 1e3, 1e-6),  # SGD: g / eps
        (0.0, 1.0, 0.1, 0.0),
    ],
)
def test_the_mean_of_a_step(g, t, eps, mean):
    """beta nu = E[u]; sigma = 2 t at B = 4."""
    beta = scaling.adam_epsilon_shrinkage(jnp.float32(g), 2 * t, 4, eps)
    nu = softsign(g, eps)
    assert float(beta) * nu == pytest.approx(mean, rel=2e-6)
    assert 0 <= beta <= 1


@pytest.mark.parametrize(
    ("g", "t", "eps", "mean", "square"),
    [
        (3.0, 0.0, 4.0, 0.6, 0.36),
        (-2.0, 2.0, 0.0, -0.6826894921, 1.0),
        (1.0, 3.0, 0.5, 0.2538260935, 0.8249554565),
        (1e-3, 1e-3, 1e3, 1e-6, 2e-12),  # SGD: (g^2 + t^2) / eps^2
    ],
)
def test_the_rate_of_one_parameter(g, t, eps, mean, square):
    """mu g / (H m), a literal from moments computed by hand; H = 1/2."""
    arrays = jnp.float32([g]), jnp.float32([2 * t])
    want = mean * g / (0.5 * square)
    for hessian in (jnp.float32([[0.5]]), jnp.float32([0.5])):
        got = scaling.adam_epsilon_learning_rate(*arrays, hessian, 4, eps)
        assert float(got) == pytest.approx(want, rel=2e-6)


def test_each_parameter_has_its_own_signal_to_noise():
    """A dead parameter says nothing about the others: averaging would be 171 x off."""
    g, sigma = np.array([1.0, 1e-6]), np.ones(2)
    beta = scaling.adam_epsilon_shrinkage(g, sigma, 16, 1e-8)
    assert float(beta[0]) == pytest.approx(math.erf(4 / math.sqrt(2)), rel=1e-6)
    want = 1e-6 * 4 * math.sqrt(2 / math.pi)  # erf(x) = 2 x / sqrt(pi)
    assert float(beta[1]) == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("kind", RATIOS)
def test_a_large_epsilon_is_sgd_and_a_diagonal_will_do(kind):
    g, sigma, hessian = problem(kind)
    for batch in (1, 64, 4096):
        rate = scaling.adam_epsilon_learning_rate(g, sigma, hessian, batch, 1e5) / 1e5
        noise = np.sum(sigma**2 * np.diag(hessian)) / batch
        want = g @ g / (g @ hessian @ g + noise)
        assert float(rate) == pytest.approx(want, rel=1e-4)
        diagonal = np.diag(np.diag(hessian))
        whole = scaling.adam_epsilon_learning_rate(g, sigma, diagonal, batch, 0.1)
        thin = scaling.adam_epsilon_learning_rate(
            g.reshape(4, 6), sigma.reshape(4, 6),
            np.diag(hessian).reshape(4, 6), batch, 0.1,
        )  # fmt: skip
        assert float(thin) == pytest.approx(float(whole), rel=1e-4)


def test_a_function_will_do_for_the_hessian():
    """For a diagonal without an error, since z_i^2 = 1."""
    g, sigma, hessian = problem("spread")
    rate = functools.partial(scaling.adam_epsilon_learning_rate, g, sigma)
    key = jax.random.key(0)
    for batch, eps in itertools.product((1, 64), (0.0, 0.3)):
        many = rate(lambda v: hessian @ v, batch, eps, key=key, probes=400)
        want = float(rate(hessian, batch, eps))
        assert float(many) == pytest.approx(want, rel=0.03)
        diagonal = np.diag(hessian)
        once = jax.jit(lambda key: rate(lambda v: diagonal * v, batch, eps, key=key))
        want = float(rate(diagonal, batch, eps))
        assert float(once(key)) == pytest.approx(want, rel=1e-5)


def test_the_surge_of_signs_needs_twice_the_trace():
    """The rate over batch sizes has a peak inside if sum s s H > 2 tr H, else not."""
    g, sigma = np.full(2, 0.3), np.ones(2)
    batches = np.logspace(-1, 6, 60)
    for h, peaks in ((0.95, False), (1.05, True)):  # 2 + 2 h against 4
        hessian = np.array([[1.0, h], [h, 1.0]])
        rates = [
            float(scaling.adam_epsilon_learning_rate(g, sigma, hessian, b, 0.0))
            for b in batches
        ]
        assert (max(rates) > 1.0001 * rates[-1]) == peaks


def test_nothing_divides_by_zero():
    """No gradient, no noise, no epsilon, in any combination; under jit and grad."""
    zero, one = jnp.zeros(2), jnp.ones(2)
    with jax.debug_nans(True):
        for g, sigma, eps in itertools.product((zero, one), (zero, one), (0.0, 0.1)):
            beta = scaling.adam_epsilon_shrinkage(g, sigma, 8, eps)
            assert ((beta >= 0) & (beta <= 1)).all()
            rate = scaling.adam_epsilon_learning_rate(g, sigma, jnp.eye(2), 8, eps)
            assert np.isfinite(rate) and (rate > 0) == g.any()
    np.testing.assert_array_equal(
        scaling.softsign(jnp.array([0.0, -2.0]), 0.0), [0, -1]
    )
    rate = lambda eps: scaling.adam_epsilon_learning_rate(one, one, jnp.eye(2), 8, eps)
    assert float(jax.jit(rate)(0.1)) == pytest.approx(float(rate(0.1)), rel=1e-6)


def test_epsilon_keeps_its_fraction_of_the_noise():
    assert scaling.adam_epsilon_for_batch(1e-8, 16, 64) == pytest.approx(
        5e-9, rel=1e-12
    )
    assert scaling.adam_epsilon_for_batch(0.0, 16, 64) == 0
    there = scaling.adam_epsilon_for_batch(3e-6, 10, 70)
    assert scaling.adam_epsilon_for_batch(there, 70, 10) == pytest.approx(3e-6)


def test_softsign_neither_overflows_nor_vanishes():
    x = jnp.array([3.0, -3e-30, 0.0, 3e30])
    np.testing.assert_allclose(scaling.softsign(x, 4.0)[0], 0.6, rtol=1e-6)
    np.testing.assert_allclose(scaling.softsign(x, 4e-30), [1, -0.6, 0, 1], rtol=1e-6)


def test_errors():
    rate = scaling.adam_epsilon_learning_rate
    one = jnp.ones(3)
    with pytest.raises(ValueError, match="new_batch=-1; give a number > 0"):
        scaling.adam_epsilon_for_batch(1e-8, 8, -1)
    with pytest.raises(ValueError, match="eps=-1e-08; give a number of at least 0"):
        scaling.adam_epsilon_for_batch(-1e-8, 8, 16)
    with pytest.raises(ValueError, match="eps=nan; give a number of at least 0"):
        scaling.adam_epsilon_shrinkage(one, one, 8, math.nan)
    with pytest.raises(ValueError, match="batch=0; give a number > 0"):
        rate(one, one, jnp.eye(3), 0, 0.1)
    with pytest.raises(ValueError, match=r"shape .2, 2.; .* give .3, 3., or .3,. for"):
        rate(one, one, jnp.eye(2), 8, 0.1)
    with pytest.raises(ValueError, match=r"a function, .* give key=jax.random.key.0."):
        rate(one, one, lambda v: v, 8, 0.1)
    with pytest.raises(ValueError, match="probes=0; give a number of at least 1"):
        rate(one, one, lambda v: v, 8, 0.1, key=jax.random.key(0), probes=0)
