"""Preference losses: by hand, by formulae in numpy, and as TRL computes them."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax.losses import preferences
from lorax.losses.preferences import Completions, Pair
from tests import trl_losses

RECORDED = json.loads(trl_losses.RECORDED.read_text())
VALUES = trl_losses.draws()
ROWS = trl_losses.ROWS
PRECISE = dict(rtol=1e-6, atol=1e-9)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def given(name):
    """The completions of both sides, from log-probabilities of their tokens."""
    found = preferences.completions(
        jnp.asarray(VALUES[name]), jnp.asarray(VALUES["mask"])
    )
    return Pair(*(jax.tree.map(lambda x: x[i * ROWS :][:ROWS], found) for i in (0, 1)))


def sides(name):
    """Sums and means of chosen and rejected, in numpy."""
    total, tokens = VALUES[name].sum(1), VALUES["mask"].sum(1)
    return total[:ROWS], total[ROWS:], (total / tokens)[:ROWS], (total / tokens)[ROWS:]


def log_s(x):
    return -np.log1p(np.exp(-x))


def wanted(name, beta=0.1, e=0.0, gamma=0.5, average=True):
    """The formulae of the module's docstring, in its own letters."""
    chosen, rejected, m, n = sides("policy")
    r, q = chosen - sides("reference")[0], rejected - sides("reference")[1]
    if name == "dpo":
        h = beta * (r - q)
        return -(1 - e) * log_s(h) - e * log_s(-h), beta * r, beta * q
    if name == "ipo":
        by = VALUES["mask"].sum(1) if average else np.ones(2 * ROWS)
        h = r / by[:ROWS] - q / by[ROWS:]
        return (h - 1 / (2 * beta)) ** 2, beta * r, beta * q
    if name == "orpo":
        o, p = (x - np.log(1 - np.exp(x)) for x in (m, n))
        return -m - beta * log_s(o - p), beta * m, beta * n
    return -log_s(beta * (m - n) - gamma), beta * m, beta * n


@pytest.mark.parametrize(
    ("name", "options", "own"),
    [
        ("dpo", {}, {}),
        ("dpo", {"beta": 0.3}, {"beta": 0.3}),
        ("dpo", {"label_smoothing": 0.2}, {"e": 0.2}),
        ("ipo", {}, {}),
        ("ipo", {"beta": 0.5, "average": False}, {"beta": 0.5, "average": False}),
        ("orpo", {}, {}),
        ("orpo", {"beta": 0.25}, {"beta": 0.25}),
        ("simpo", {}, {"beta": 2.0}),
        ("simpo", {"beta": 2.5, "gamma": 1.2}, {"beta": 2.5, "gamma": 1.2}),
    ],
)
def test_losses_and_rewards_follow_the_formulae(name, options, own):
    models = [given("policy")] + [given("reference")] * (name in ("dpo", "ipo"))
    found = getattr(preferences, name)(*models, **options)
    for got, want in zip(found, wanted(name, **own), strict=True):
        np.testing.assert_allclose(got, want, **PRECISE)
    np.testing.assert_allclose(found.margin, found.chosen - found.rejected, **PRECISE)


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_dpo_and_ipo_are_those_of_trl(name):
    for key, want in RECORDED[name].items():
        beta = 0.1 if key == "default" else float(key)
        found = getattr(preferences, name)(
            given("policy"), given("reference"), beta=beta
        )
        np.testing.assert_allclose(found.loss.mean(), want["loss"], **PRECISE)
        for side in ("chosen", "rejected"):
            reward, total = getattr(found, side), getattr(given("policy"), side).total
            np.testing.assert_allclose(
                reward.mean(), want[f"rewards/{side}"], **PRECISE
            )
            np.testing.assert_allclose(total.mean(), want[f"logps/{side}"], **PRECISE)
        assert (found.margin > 0).mean() == want["rewards/accuracies"]
        np.testing.assert_allclose(
            found.margin.mean(), want["rewards/margins"], **PRECISE
        )


def test_smoothed_dpo_orpo_and_simpo_are_those_of_trl():
    policy = given("policy")
    likelihood = -policy.chosen.mean
    pairs = [
        (
            preferences.dpo(policy, given("reference"), label_smoothing=0.2),
            RECORDED["cdpo"],
            1e-6,
        ),
        (preferences.simpo(policy), RECORDED["simpo"], 1e-6),
        # float32, because TRL casts
        (preferences.orpo(policy, jnp.zeros(ROWS)), RECORDED["orpo"]["default"], 1e-6),
        (
            preferences.orpo(policy, jnp.zeros(()), beta=0.25),
            RECORDED["orpo"]["0.25"],
            1e-6,
        ),
    ]
    for found, want, tolerance in pairs:
        for got, name in zip(found, ("loss", "chosen", "rejected"), strict=True):
            np.testing.assert_allclose(got, want[name], rtol=tolerance)
    whole = preferences.orpo(policy).loss - preferences.orpo(policy, jnp.zeros(())).loss
    np.testing.assert_allclose(whole, likelihood, **PRECISE)


@pytest.mark.parametrize("key", ["default", "nearer", "weights"])
def test_kto_and_its_baseline_are_those_of_trl(key):
    options = {"beta": 0.5, "desirable_weight": 1.33, "undesirable_weight": 0.8}
    options = options if key == "weights" else {}
    others = np.sort(VALUES["others"].sum(-1), axis=0)[:: -1 if key == "nearer" else 1]
    before, now = (Completions(jnp.asarray(x), jnp.ones(ROWS)) for x in others)
    baseline = preferences.kto_baseline(now, before)
    want = RECORDED["kto"][key]
    np.testing.assert_allclose(baseline, want["kl"], **PRECISE)
    assert (baseline == 0) == (key == "nearer")

    def mean(policy):
        desirable = jnp.asarray(VALUES["desirable"])
        reference = given("reference").chosen
        # the policy's own baseline, which must have no gradient
        own = baseline + 0 * preferences.kto_baseline(policy, reference)
        loss, rewards = preferences.kto(policy, reference, desirable, own, **options)
        return loss.mean(), rewards

    policy = given("policy").chosen
    (loss, rewards), slope = jax.value_and_grad(mean, has_aux=True)(policy)
    np.testing.assert_allclose(loss, want["loss"], **PRECISE)
    chosen, reference = sides("policy")[0], sides("reference")[0]
    beta, r = options.get("beta", 0.1), chosen - reference
    np.testing.assert_allclose(rewards, beta * r, **PRECISE)
    s = 1 / (1 + np.exp(-beta * (r - want["kl"])))
    up, down = (options.get(f"{k}desirable_weight", 1.0) for k in ("", "un"))
    weight = np.where(VALUES["desirable"], up, down)
    sign = np.where(VALUES["desirable"], -1, 1)
    np.testing.assert_allclose(
        slope.total, sign * weight * beta * s * (1 - s) / ROWS, **PRECISE
    )


def test_rows_that_only_fill_a_batch_do_not_move_the_baseline():
    now = Completions(jnp.array([1.0, 3, 99]), jnp.ones(3))
    before = Completions(jnp.zeros(3), jnp.ones(3))
    found = preferences.kto_baseline(now, before, jnp.array([1.0, 1, 0]))
    assert found == 2


def test_only_the_policy_has_a_gradient_and_only_through_the_loss():
    def total(policy, reference):
        found = preferences.dpo(policy, reference)
        return found.loss.sum() + found.chosen.sum() + found.margin.sum()

    policy, reference = jax.grad(total, (0, 1))(given("policy"), given("reference"))
    assert not any(leaf.any() for leaf in jax.tree.leaves(reference))
    chosen, rejected = sides("policy")[:2]
    before = sides("reference")
    h = 0.1 * (chosen - before[0] - rejected + before[1])
    slope = -0.1 / (1 + np.exp(h))
    np.testing.assert_allclose(policy.chosen.total, slope, **PRECISE)
    np.testing.assert_allclose(policy.rejected.total, -slope, **PRECISE)


def test_the_odds_of_what_is_certain_stay_finite():
    def loss(x):
        own = Completions(x, jnp.ones(2, x.dtype))
        return preferences.orpo(Pair(own, own)).loss.sum()

    for dtype in (jnp.float32, jnp.float64):
        value, slope = jax.value_and_grad(loss)(jnp.array([0.0, -200.0], dtype))
        assert np.isfinite(value) and np.isfinite(slope).all()


def test_completions_add_up_what_has_weight():
    log_probs = jnp.array([[[-1.0, -2.0, -jnp.inf]], [[-3.0, -jnp.inf, -jnp.inf]]])
    weights = jnp.array([[[1.0, 1, 0]], [[0.0, 0, 0]]])
    found = preferences.completions(log_probs, weights)
    assert found.total.tolist() == [[-3.0], [0.0]]
    assert found.mean.tolist() == [[-1.5], [0.0]]


SOME = Completions(jnp.array([-1.0]), jnp.array([1.0]))


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("dpo", {"beta": 0.0}, "beta=0.0; it must be above 0"),
        ("dpo", {"label_smoothing": 0.5}, r"label_smoothing=0.5; .* in \[0, 0.5\)"),
        ("ipo", {"beta": -1.0}, "beta=-1.0"),
        ("orpo", {"beta": math.nan}, "beta=nan"),
        ("simpo", {"gamma": -1.0}, "gamma=-1.0; it must be at least 0"),
        ("kto", {"undesirable_weight": 0.0}, "undesirable_weight=0.0"),
    ],
)
def test_options_out_of_range_are_named(name, options, told):
    pair = Pair(SOME, SOME)
    given = {
        "kto": (SOME, SOME, jnp.array([True]), 0.0),
        "orpo": (pair,),
        "simpo": (pair,),
    }
    with pytest.raises(ValueError, match=told):
        getattr(preferences, name)(*given.get(name, (pair, pair)), **options)


def test_weights_of_another_shape_are_refused():
    told = r"log_probs has shape \(2, 3\) and weights \(2,\)"
    with pytest.raises(ValueError, match=told):
        preferences.completions(jnp.ones((2, 3)), jnp.ones(2))


def learned_preferences(scope):
    """What docs/howto/preferences.md shows; run by test_howto."""
    first, *_, last = scope["told"]
    np.testing.assert_allclose(first["loss"], np.log(2), rtol=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert last["loss"] < 0.6 and last["rewards/margins"] > 0.2
