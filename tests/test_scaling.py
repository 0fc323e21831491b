"""The learning-rate laws against literals by hand and against Monte Carlo."""

import math

import jax
import numpy as np
import pytest

from lorax import scaling

RULES = [
    ("linear", {}),
    ("sqrt", {}),
    ("sgd", {"noise_scale": 48.0}),
    ("surge", {"noise_scale": 48.0}),
    ("mean_field", {"noise_scale": 48.0}),
    ("mean_field", {"noise_scale": 48.0, "beta_n": 0.5}),
    ("mean_field", {"noise_scale": 48.0, "beta_n": 2.0}),
]


def quadratic(n=24, seed=0):
    """A gradient, per-example deviations with one signal-to-noise ratio, a Hessian."""
    rng = np.random.default_rng(seed)
    sigma = np.exp(0.5 * rng.standard_normal(n))
    g = 0.1 * sigma * rng.choice([-1, 1], n)
    root = rng.standard_normal((n, n)) / np.sqrt(n)
    hessian = 0.3 * root @ root.T + 0.3 * np.outer(np.sign(g), np.sign(g))
    return g, sigma, hessian + 0.5 * np.eye(n)


def best_rate(step, g, sigma, hessian, batch, draws=20_000):
    """E[u].g / E[u.Hu], which minimises the expected loss along the step u."""
    rng = np.random.default_rng(1)
    noise = rng.standard_normal((draws // 2, g.size))
    noise = np.concatenate([noise, -noise])
    u = step(g + sigma / np.sqrt(batch) * noise)
    return u.mean(0) @ g / np.mean(np.sum(u @ hessian * u, -1))


# Batch size


def test_the_laws_by_hand():
    lr = scaling.learning_rate_for_batch
    assert lr(2e-4, 16, 64) == pytest.approx(4e-4, rel=1e-12)
    assert lr(2e-4, 16, 64, "linear") == pytest.approx(8e-4, rel=1e-12)
    # 1 / (1 + 24 / 8) = 1/4 and 1 / (1 + 24 / 72) = 3/4
    assert lr(0.1, 8, 72, "sgd", noise_scale=24) == pytest.approx(0.3, rel=1e-12)
    # 2 / (sqrt(4) + sqrt(1/4)) = 4/5 on either side of the peak, 1 at it
    assert lr(0.4, 6, 24, "surge", noise_scale=24) == pytest.approx(0.5, rel=1e-12)
    assert lr(0.4, 6, 96, "surge", noise_scale=24) == pytest.approx(0.4, rel=1e-12)
    # pi kappa^2 / 2 = 3: beta = 1/2 at B = 1, sqrt(3)/2 at B = 9
    mean_field = {"rule": "mean_field", "noise_scale": 6 / math.pi}
    got = lr(1.0, 1, 9, **mean_field)
    assert got == pytest.approx(math.sqrt(3), rel=1e-12)
    # 2 / (beta_n / beta + beta / beta_n) with beta_n = 1/2: 1, then 2/(1/sqrt3 + sqrt3)
    got = lr(1.0, 1, 9, **mean_field, beta_n=0.5)
    assert got == pytest.approx(math.sqrt(3) / 2, rel=1e-12)


@pytest.mark.parametrize(("rule", "options"), RULES)
def test_every_law_is_a_ratio_with_an_inverse(rule, options):
    lr = lambda old, new: scaling.learning_rate_for_batch(
        1.0, old, new, rule, **options
    )
    assert lr(7.0, 7.0) == 1.0
    assert lr(2.0, 40.0) == pytest.approx(lr(2.0, 9.0) * lr(9.0, 40.0), rel=1e-12)
    inverse = lambda new_lr: scaling.batch_for_learning_rate(
        1.0, 2.0, new_lr, rule, **options
    )
    for batch in (0.5, 2.0, 9.0, 14.0):  # below every peak
        assert inverse(lr(2.0, batch)) == pytest.approx(batch, rel=1e-9)


def test_two_batch_sizes_with_one_rate_give_the_smaller():
    surge = {"rule": "surge", "noise_scale": 24.0}
    rate = scaling.learning_rate_for_batch(0.4, 6, 96, **surge)
    got = scaling.batch_for_learning_rate(0.4, 6, rate, **surge)
    assert got == pytest.approx(6, rel=1e-12)
    mean_field = {"rule": "mean_field", "noise_scale": 6 / math.pi, "beta_n": 0.5}
    # the peak: pi kappa^2 beta_n^2 / (2 (1 - beta_n^2)) = 3 (1/4) / (3/4)
    beyond = scaling.learning_rate_for_batch(1.0, 1, 5, **mean_field)
    got = scaling.batch_for_learning_rate(1.0, 1, beyond, **mean_field)
    assert got < 1
    again = scaling.learning_rate_for_batch(1.0, 1, got, **mean_field)
    assert again == pytest.approx(beyond, rel=1e-12)
    assert all(
        scaling.learning_rate_for_batch(1.0, 1, b, **mean_field) < 1
        for b in (0.5, 0.9, 1.1, 2.0)
    )


def test_the_limits_of_the_laws():
    big = dict(noise_scale=1e9)
    for rule, plain in (("sgd", "linear"), ("surge", "sqrt"), ("mean_field", "sqrt")):
        want = scaling.learning_rate_for_batch(1.0, 4, 64, plain)
        for options in (big, {"noise_scale": math.inf}):
            got = scaling.learning_rate_for_batch(1.0, 4, 64, rule, **options)
            assert got == pytest.approx(want, rel=1e-6)
            inverse = scaling.batch_for_learning_rate(1.0, 4, want, rule, **options)
            assert inverse == pytest.approx(64, rel=1e-6)
    # surge is the small-B limit of mean_field: N = pi kappa^2 beta_n^2 / 2
    kappa, beta_n = 1e6, 0.01
    surge = math.pi * kappa * beta_n**2 / 2
    for batch in (10.0, 100.0, 1000.0):
        assert scaling.learning_rate_for_batch(
            1.0, 50, batch, "surge", noise_scale=surge
        ) == pytest.approx(
            scaling.learning_rate_for_batch(
                1.0, 50, batch, "mean_field", noise_scale=kappa, beta_n=beta_n
            ),
            rel=2e-3,
        )


def test_sgd_against_monte_carlo():
    g, sigma, hessian = quadratic()
    curvature = g @ hessian @ g
    noise_scale = np.sum(sigma**2 * np.diag(hessian)) / curvature
    rate = lambda batch: best_rate(lambda x: x, g, sigma, hessian, batch)
    start = rate(8)
    for batch in (1, 64, 1024):
        want = scaling.learning_rate_for_batch(
            start, 8, batch, "sgd", noise_scale=noise_scale
        )
        assert want == pytest.approx(rate(batch), rel=0.02)


def test_sign_descent_against_monte_carlo():
    """The mean-field form holds at every batch size, the surge form at small ones."""
    g, sigma, hessian = quadratic()
    signs = np.outer(np.sign(g), np.sign(g))
    off = np.sum(signs * hessian) - np.trace(hessian)
    beta_n = math.sqrt(np.trace(hessian) / off)
    assert beta_n < 1
    kappa = 100.0  # (sigma / g)^2
    options = {"rule": "mean_field", "noise_scale": kappa, "beta_n": beta_n}
    rate = lambda batch: best_rate(np.sign, g, sigma, hessian, batch)
    rates = {batch: rate(batch) for batch in (1, 4, 64, 16384)}
    for batch in (4, 64, 16384):
        got = scaling.learning_rate_for_batch(rates[1], 1, batch, **options)
        assert got == pytest.approx(rates[batch], rel=0.1)
    surge = {"rule": "surge", "noise_scale": math.pi * kappa * beta_n**2 / 2}
    got = scaling.learning_rate_for_batch(rates[1], 1, 4, **surge)
    assert got == pytest.approx(rates[4], rel=0.1)
    got = scaling.learning_rate_for_batch(rates[1], 1, 16384, **surge)
    assert got < 0.5 * rates[16384]


def test_laws_are_traceable():
    law = lambda noise: scaling.learning_rate_for_batch(
        0.1, 8.0, 24.0, "sgd", noise_scale=noise
    )
    assert float(jax.jit(law)(24.0)) == pytest.approx(0.2)
    assert isinstance(law(24.0), float)


# Widths and ranks


def test_the_ratio_of_lora_plus():
    assert scaling.lora_plus_ratio(2048, 2048, 8) == 16.0
    # 256 -> 1024 and 1024 -> 256 at rank 8, as measured: 2.83 and 22.6
    assert scaling.lora_plus_ratio(256, 1024, 8) == pytest.approx(2 * math.sqrt(2))
    assert scaling.lora_plus_ratio(1024, 256, 8) == pytest.approx(16 * math.sqrt(2))
    assert scaling.lora_plus_ratio(8, 4096, 8) == 1.0
    assert scaling.lora_plus_ratio(65536, 64, 1) == 64.0


@pytest.mark.parametrize("kind", ["standard", "rank_stabilized"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_first_step_lowers_the_loss_alike_at_any_rank(kind, optimizer):
    """lr <G, s a db> with db the step from b = 0, averaged over draws of a."""
    rng = np.random.default_rng(0)
    n, m, alpha = 64, 16, 16.0
    gradient = rng.standard_normal((n, m)) * np.exp(rng.standard_normal((n, 1)))

    def decrease(rank):
        s = alpha / (rank if kind == "standard" else math.sqrt(rank))
        lr = scaling.learning_rate_for_rank(1e-3, 4, rank, kind, optimizer=optimizer)
        a = rng.uniform(-1, 1, (4000 // rank, n, rank)) / math.sqrt(n)
        slope = s * a.transpose(0, 2, 1) @ gradient
        step = lr * (np.sign(slope) if optimizer == "adam" else slope)
        return np.mean(np.sum(gradient * (s * a @ step), (1, 2)))

    # 4000 rows of a^T G in each mean; their 16 entries are nearly independent
    for rank in (8, 32):
        assert decrease(rank) == pytest.approx(decrease(4), rel=0.05)


def test_the_rate_for_a_rank_by_hand():
    lr = scaling.learning_rate_for_rank
    assert lr(2e-4, 8, 32) == 2e-4
    assert lr(2e-4, 8, 32, "rank_stabilized") == pytest.approx(1e-4)
    assert lr(2e-4, 8, 32, optimizer="sgd") == pytest.approx(8e-4)
    assert lr(2e-4, 8, 32, "rank_stabilized", optimizer="sgd") == 2e-4


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("learning_rate_for_batch", 0.1, 8, 16, "cube"), "rule='cube'; choose one of"),
        (
            ("learning_rate_for_batch", 0.1, 8, 16, "sgd"),
            "needs noise_scale; lorax.optim",
        ),
        (("learning_rate_for_batch", 0.1, 0, 16), "batch=0; give a number > 0"),
        (("learning_rate_for_batch", -0.1, 8, 16), "lr=-0.1; give a number > 0"),
        (("batch_for_learning_rate", 0.1, 8, math.nan), "new_lr=nan; give a number"),
        (("lora_plus_ratio", 64, 0, 8), "out=0; give a number > 0"),
        (("learning_rate_for_rank", 0.1, 8, 16, "mu"), "scaling='mu'; choose one of"),
        (("learning_rate_for_rank", 0.1, 8, 0), "new_rank=0; give a number > 0"),
    ],
)
def test_what_has_no_meaning_is_refused(call, message):
    name, *args = call
    with pytest.raises(ValueError, match=message):
        getattr(scaling, name)(*args)
    with pytest.raises(ValueError, match="optimizer='muon'"):
        scaling.learning_rate_for_rank(0.1, 8, 16, optimizer="muon")


@pytest.mark.parametrize(
    ("rule", "options", "new_lr", "message"),
    [
        # tuned at N: half of the supremum
        ("sgd", {}, 0.2, "no batch size has new_lr=0.2 .* the rate stays below 0.2"),
        ("surge", {}, 0.11, "the rate stays at most 0.1"),
        # pi kappa^2 / 2 = B: beta = sqrt(1/2), and 1 at most
        ("mean_field", {}, 0.1 * math.sqrt(2) * 1.001, "stays below 0.1414"),
        # at beta_n = sqrt(1/2) the peak
        ("mean_field", {"beta_n": math.sqrt(0.5)}, 0.1001, "stays at most 0.1"),
    ],
)
def test_a_rate_that_no_batch_size_has(rule, options, new_lr, message):
    noise = 16 * 2 / math.pi if rule == "mean_field" else 16
    with pytest.raises(ValueError, match=message):
        scaling.batch_for_learning_rate(
            0.1, 16, new_lr, rule, noise_scale=noise, **options
        )
