"""The noise scale for gradients with known noise, and for a quadratic by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorax import optim
from lorax.types import MicrobatchNorms

GRADS = {"w": jnp.ones(3)}


def after(tx, norms):
    """The state after these measurements, in one scan."""
    scan = lambda state, now: (tx.update(GRADS, state, microbatch=now)[1], None)
    return jax.lax.scan(scan, tx.init(GRADS), norms)[0]


def test_one_step_by_hand():
    # S = (5 - 2) / (1/2 - 1/8) = 8, |G|^2 = (8 2 - 2 5) / 6 = 1
    tx = optim.track_noise_scale(decay=0.75)
    norms = MicrobatchNorms(jnp.float32(5), jnp.float32(2), 2, 8)
    updates, state = tx.update(GRADS, tx.init(GRADS), microbatch=norms, base=None)
    assert updates is GRADS
    assert float(state.covariance) == 0.25 * 8 and float(state.gradient) == 0.25 * 1
    assert float(optim.noise_scale(state)) == 8.0
    # then S = 4 / (3/8), |G|^2 = (8 2 - 2 6) / 6: the ratio is of the averages
    again = MicrobatchNorms(6.0, 2.0, 2, 8)
    _, state = tx.update(GRADS, state, microbatch=again)
    want = (0.75 * 8 + 32 / 3) / (0.75 * 1 + 2 / 3)
    assert float(optim.noise_scale((optax.EmptyState(), state))) == pytest.approx(want)


def test_a_negative_estimate_is_clamped_when_read_and_not_in_the_average():
    tx = optim.track_noise_scale(decay=0.5)
    assert np.isnan(optim.noise_scale(tx.init(GRADS)))
    # |G|^2 = (4 1 - 2 3) / 2 = -1, S = 2 / (1/4) = 8
    _, state = tx.update(
        GRADS, tx.init(GRADS), microbatch=MicrobatchNorms(3.0, 1.0, 2, 4)
    )
    assert float(state.gradient) == -0.5 and np.isinf(optim.noise_scale(state))
    # |G|^2 = (4 5 - 2 6) / 2 = 4, S = 4: averages (4 - 1/2) / 2 and (4 + 4) / 2
    _, state = tx.update(GRADS, state, microbatch=MicrobatchNorms(6.0, 5.0, 2, 4))
    assert float(optim.noise_scale(state)) == pytest.approx((4 / 2 + 2) / (2 - 0.25))
    # S < 0 reads as no noise
    _, state = tx.update(
        GRADS, tx.init(GRADS), microbatch=MicrobatchNorms(1.0, 2.0, 2, 4)
    )
    assert float(optim.noise_scale(state)) == 0


def test_the_ratio_of_means_finds_the_noise_scale_of_a_gaussian():
    rng = np.random.default_rng(0)
    n, small, parts, steps = 20, 8, 4, 20_000
    g = rng.standard_normal(n)
    sigma = 4 * np.exp(0.5 * rng.standard_normal(n))
    true = np.sum(sigma**2) / np.sum(g**2)
    # microbatch means are normal with covariance Sigma / 8: exact, and cheap to draw
    noise = rng.standard_normal((steps, parts, n)) * sigma / np.sqrt(small)
    each = g + noise
    g1, g2 = np.sum(each**2, -1).mean(1), np.sum(each.mean(1) ** 2, -1)
    sizes = jnp.full(steps, small), jnp.full(steps, small * parts)
    norms = MicrobatchNorms(
        jnp.asarray(g1, jnp.float32), jnp.asarray(g2, jnp.float32), *sizes
    )
    state = jax.jit(lambda norms: after(optim.track_noise_scale(0.9999), norms))(norms)
    B1, B2 = small, small * parts
    S, G2 = (g1 - g2) / (1 / B1 - 1 / B2), (B2 * g2 - B1 * g1) / (B2 - B1)
    # the spread of a ratio of means of about 10^4 steps, to first order
    error = np.std(S / S.mean() - G2 / G2.mean()) / np.sqrt(steps / 2)
    assert error < 0.03
    assert float(optim.noise_scale(state)) == pytest.approx(true, rel=5 * error)
    # whereas the mean of ratios is far off: some |G|^2 are negative
    assert (G2 < 0).any() and abs(np.mean(S / G2) / true - 1) > 0.2


def test_members_of_a_population_have_their_own():
    tx = optim.track_noise_scale()
    norms = MicrobatchNorms(jnp.array([5.0, 6.0]), jnp.array([2.0, 2.0]), 2, 8)
    in_axes = MicrobatchNorms(0, 0, None, None)
    state = jax.vmap(
        lambda norms: tx.update(GRADS, tx.init(GRADS), microbatch=norms)[1], (in_axes,)
    )(norms)
    np.testing.assert_allclose(optim.noise_scale(state), [8, 16], rtol=1e-6)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match=r"decay=1.0; give a decay rate in \[0, 1\)"):
        optim.track_noise_scale(1.0)
    tx = optax.chain(optim.track_noise_scale(), optax.sgd(0.1))
    state = tx.init(GRADS)
    with pytest.raises(ValueError, match="accumulate >= 2"):
        tx.update(GRADS, state)
    with pytest.raises(ValueError, match="large_batch=8: the noise scale comes from"):
        tx.update(GRADS, state, microbatch=MicrobatchNorms(1.0, 1.0, 8, 8))
    with pytest.raises(ValueError, match="holds 0"):
        optim.noise_scale(optax.sgd(0.1).init(GRADS))
    two = optax.chain(optim.track_noise_scale(), optim.track_noise_scale())
    with pytest.raises(ValueError, match="holds 2"):
        optim.noise_scale(two.init(GRADS))
