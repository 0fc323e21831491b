"""The study of one step: a linear model, whose best rates are known in closed form."""

import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from experiments.studies.claims import one_step, steps
from experiments.studies.method import comparison

pytestmark = pytest.mark.once

N, IN, OUT = 24, 5, 3


def regression():
    """Rows x, y in two batches, and the whole of a kernel to be moved."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(N, IN)), rng.normal(size=(N, OUT))
    w = rng.normal(size=(IN, OUT))

    def loss_fn(params, batch):
        off = batch["x"] @ params["w"] - batch["y"]
        return 0.5 * jnp.mean(jnp.sum(off**2, -1)), {}

    moved = {"w": lorax.Full(jnp.asarray(w, jnp.float32))}
    data = [
        {"x": jnp.asarray(x[half], jnp.float32), "y": jnp.asarray(y[half], jnp.float32)}
        for half in (slice(None, N // 2), slice(N // 2, None))
    ]
    return (x, y, w), steps.place(loss_fn, moved, ({}, {"w": jnp.zeros_like(w)}), data)


def test_the_best_rate_of_a_quadratic_loss_is_slope_over_curvature():
    (x, y, w), here = regression()
    grads = x[:, :, None] * (x @ w - y)[:, None, :]
    np.testing.assert_allclose(here.grads, grads.reshape(N, -1), rtol=1e-4, atol=1e-5)
    g, noise = grads.mean(0), grads.var(0).sum()
    assert here.noise_scale == pytest.approx(noise / np.sum(g**2), rel=1e-4)
    hessian = x.T @ x / N
    v = np.random.default_rng(1).normal(size=(IN, OUT))
    bent = here.bend(jnp.asarray(v.ravel(), jnp.float32))
    np.testing.assert_allclose(bent, (hessian @ v).ravel(), rtol=1e-4, atol=1e-5)
    for eps in (0.0, 2.0):
        cell = steps.Cell(20, 4, eps)
        line = steps.measure(here, cell, seed=5)
        size = np.sqrt(np.mean(g**2 + grads.var(0) / steps.USUAL))
        assert line["eps"] == pytest.approx(eps * size, rel=1e-4)
        drawn = np.random.default_rng(5).integers(N, size=(steps.DRAWS, 4))
        mean = grads[drawn].mean(1)
        u = mean / np.sqrt(mean**2 + line["eps"] ** 2)
        slope = np.sum(u * g, (1, 2)).mean()
        best = slope / np.sum(u * (hessian @ u), (1, 2)).mean()
        found = steps.optimum(line["rates"], np.array(line["losses"]).mean(1))
        assert found == pytest.approx(best, rel=1e-3)
        values = steps.octaves(line)
        assert values.shape == (steps.DRAWS,)
        assert values.mean() == pytest.approx(np.log2(best), abs=0.5)


def test_the_jackknife_of_equal_draws_has_no_spread():
    rates = (1.0, 2.0, 4.0)  # (rate - 3)^2 - 9
    losses = np.repeat([[-5.0], [-8.0], [-8.0]], 4, 1)
    line = {"rates": rates, "losses": losses}
    np.testing.assert_allclose(steps.octaves(line), np.log2(3), rtol=1e-6)
    assert steps.lowest(lambda k: (k + 3) ** 2) == -3


def test_cells_resume_and_their_claims_are_held_against_the_laws(tmp_path, monkeypatch):
    _, here = regression()
    monkeypatch.setattr(steps, "reach", lambda setting, point: here)
    monkeypatch.setattr(one_step, "POINTS", (20,))
    cells = tuple(cell for cell in one_step.CELLS if cell.point == 20)
    monkeypatch.setattr(one_step, "CELLS", cells)
    path = tmp_path / "runs.jsonl"
    digests = {"MiniLM": one_step.digest()}
    found = one_step.study(lambda: None, comparison.Runs(path, digests))
    assert list(found) == [one_step.name(cell) for cell in cells]
    late = comparison.Runs(path, digests, minutes=-1)
    again = one_step.study(lambda: None, late)
    assert {k: v["rates"] for k, v in again.items()} == {
        k: v["rates"] for k, v in found.items()
    }
    told = {"cells": again, "cpu_seconds": 3}
    assert "| 256 | 0 |" in one_step.page(told)
    claims = one_step.claims(told)
    told = [claim.number.split(",")[0] for claim in claims]
    assert told[:4] == ["octaves from batch 4 to 64"] * 4
    sqrt = claims[0]
    rise = [steps.octaves(again[one_step.name(cells[i])]) for i in (0, 2)]
    np.testing.assert_allclose(sqrt.values, rise[1] - rise[0] - 2.0)  # 64 = 4 * 4^2
    assert (sqrt.low, sqrt.high) == (-0.5, 0.5)
    assert len(claims) == 10
