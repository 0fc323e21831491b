"""The studies on the quickstart's text: run at toy sizes, and their report."""

import importlib
import json

import grain
import jax
import jax.numpy as jnp
import matplotlib.figure
import ml_collections
import numpy as np
import optax
import pytest

from experiments import paired
from experiments.studies.method import comparison, findings, panels, shared, text, trial
from experiments.studies.questions import batch_sizes
from experiments.trainer import loop
from lorax import training
from lorax.adapters import Full

pytestmark = pytest.mark.once

TINY = text.Study(
    "ranks", "A question?", {"LoRA": {}, "r = 2": {"adapter.rank": 2}}, "LoRA",
    steps=4, every=2, watch=lambda setting, chosen: lambda seed, step, *_: step,
)  # fmt: skip


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return shared.Setting(tmp_path_factory.mktemp("base"), toy=True)


def settings(study):
    return {a: text.digest(study, f, True) for a, f in study.arms.items()}


@pytest.mark.parametrize("name", findings.STUDIES)
def test_every_arm_is_a_config_with_rates_of_one_budget(name):
    study = importlib.import_module(f"experiments.studies.questions.{name}").STUDY
    assert study.name == name and study.baseline in study.arms
    assert set(study.grids) <= set(study.arms)
    for arm, fields in study.arms.items():
        config = text.configured(study, fields, toy=False)
        assert config.run.steps == study.steps
        assert len(text.grid_of(study, arm, False)) == len(text.GRID)
    digests = {text.digest(study, f, False) for f in study.arms.values()}
    assert len(digests) == len(study.arms)


def test_a_study_runs_goes_on_and_is_reported(setting, tmp_path):
    path = tmp_path / "runs.jsonl"
    runs = comparison.Runs(path, settings(TINY))
    text.run(TINY, setting, runs)
    found = text.results(TINY, runs, toy=True)
    assert not found["missing"] and set(found["arms"]) == {"LoRA", "r = 2"}
    arm = found["arms"]["LoRA"]
    assert np.shape(arm["curves"]) == (2, 2) and arm["watched"] == [[2, 4], [2, 4]]
    assert arm["ms"] > 0 and found["cpu_hours"] >= 0

    ms = text.times(TINY, setting, list(found["arms"]), rounds=2)
    assert set(ms) == set(found["arms"]) and min(ms.values()) > 0
    timed = text.results(TINY, runs, True, {arm["config"]: 7.5})
    assert timed["arms"]["LoRA"]["ms"] == 7.5
    assert timed["arms"]["r = 2"]["ms"] == found["arms"]["r = 2"]["ms"]

    late = comparison.Runs(path, settings(TINY), minutes=-1)
    text.run(TINY, setting, late)  # nothing is left to run
    assert late.lines.keys() == runs.lines.keys()

    panels.figure(found, tmp_path / "figure.png", panels.rates, panels.curves)
    assert (tmp_path / "figure.png").stat().st_size > 5_000
    module = importlib.import_module("experiments.studies.questions.ranks")
    written = findings.section(module, found)
    assert "| LoRA |" in written and "A question?" in written


def results(arms, **more):
    return {
        "study": "ranks", "question": "Q?", "baseline": "LoRA", "steps": 4, "every": 2,
        "smoke": False, "arms": arms, "missing": [], "runs": 3, "cpu_hours": 0.5,
        "jax": "x", "device": "cpu", **more,
    }  # fmt: skip


def arm(curves, ms=10.0):
    return {
        "rate": 0.01,
        "grid": {},
        "curves": curves,
        "ms": ms,
        "config": "abcdefghij",
    }


def test_the_table_by_hand():
    arms = {
        "LoRA": arm([[3.0, 2.0], [3.0, 2.2]]),
        "slow": arm([[2.0, 1.0], [2.0, 1.2]], ms=20.0),  # half way when LoRA is done
        "same": arm([[3.0, 2.5], [3.0, 2.1]], ms=5.0),
    }
    rows = findings.table(results(arms)).splitlines()
    assert "| LoRA | 0.01 | 2.1000 +- 0.1000 | - | - | 1.00 |" in rows
    slow = next(row for row in rows if "slow" in row)
    assert "-1.0000 +- 0.0000 |" in slow and slow.endswith("| 2.00 |")
    # 40 ms of training: at its first point, 2.0, against 2.0 and 2.2
    assert "-0.1000 +- 1.2706: no difference shown" in slow
    same = next(row for row in rows if "same" in row)
    assert same.count("no difference shown") == 2


def test_a_stalled_run_has_no_value(monkeypatch):
    """Its adapters are finite, because the step skipped the updates."""
    rate = lambda count: jnp.where(count == 3, jnp.inf, 0.1)
    loss_fn = training.simple_loss(lambda params, x: jnp.sum(params["w"] * x))
    tx = optax.sgd(rate)

    def start(seed, learning_rate):
        adapters = {"w": Full(jnp.zeros(()))}
        state = training.create_state(jax.random.key(seed), adapters, tx)
        return loop.Prepared(state, {"w": 0.0}, step)

    step = loop.Compiled(training.make_train_step(loss_fn, tx))
    monkeypatch.setattr(trial, "make_start", lambda *arguments: start)
    config = ml_collections.ConfigDict({"run": {"steps": 6}})
    batches = lambda seed: grain.MapDataset.source([np.float32(1)] * 6)
    run = trial.make_run(config, loss_fn, None, batches)
    curve = run(0, 0.1, lambda params: float(params["w"]), every=2).curve
    # The third update is the last: with the fourth step skipped, no value is reported.
    np.testing.assert_allclose(curve, [-0.2, np.nan, np.nan], rtol=1e-6)


def test_refined_rates_lie_half_way_to_the_neighbours(monkeypatch):
    study = TINY._replace(refine=True, grids={"LoRA": (1.0, 4.0, 16.0)})
    asked = []

    def score(rate):
        asked.append(rate)
        return abs(rate - 7.0)

    assert text.best_rate(study, "LoRA", score, toy=False) == 8.0
    assert set(asked) == {1.0, 4.0, 16.0, 2.0, 8.0}
    plain = study._replace(refine=False)
    assert text.best_rate(plain, "LoRA", score, toy=False) == 4.0


def test_the_best_rate_is_a_parabolas_vertex():
    log = np.log([0.01, 0.02, 0.04])
    scores = (log - np.log(0.025)) ** 2
    grid = {f"{np.exp(x):.3g}": y for x, y in zip(log, scores, strict=True)}
    assert batch_sizes.optimum(grid) == pytest.approx(0.025, rel=1e-6)
    assert batch_sizes.optimum({"0.1": 2.0, "1": 1.0}) == pytest.approx(1.0)


def test_a_law_is_found_again():
    sizes = (4, 8, 16, 32, 64)
    sqrt = [0.01 * (size / 4) ** 0.5 for size in sizes]
    constant, scale, error = batch_sizes.fit(sizes, sqrt, "sqrt")
    assert constant == pytest.approx(0.01) and np.isnan(scale) and error < 1e-6
    # 2 / (sqrt(N / B) + sqrt(B / N)) with N = 16, by hand
    surge = [0.02 / (4 / size**0.5 + size**0.5 / 4) for size in sizes]
    constant, scale, error = batch_sizes.fit(sizes, surge, "surge")
    assert (constant, scale) == pytest.approx((0.008, 16.0)) and error < 1e-6
    assert batch_sizes.fit(sizes, surge, "sqrt")[2] > 0.5


def test_pairs_are_told_at_equal_steps_and_at_equal_wall_time():
    arms = {
        "LoRA": arm([[3.0, 2.0], [3.0, 2.2]]),
        "r = 8": arm([[3.0, 2.0], [3.0, 2.2]]),
        "r = 8, rs": arm([[2.0, 1.0], [2.0, 1.2]], ms=20.0),
    }
    module = importlib.import_module("experiments.studies.questions.ranks")
    written = findings.section(module, results(arms))
    assert (
        "- r = 8, rs minus r = 8: -1.0000 +- 0.0000 at equal steps, "
        "-0.1000 +- 1.2706: no difference shown at equal wall time"
    ) in written


def test_a_run_that_diverged_is_not_called_alike():
    told = paired.difference(np.array([0.1, np.nan]))
    assert told == "not finite"


def test_the_page_refuses_toy_results_and_names_what_was_not_run(tmp_path):
    folder = tmp_path / "results" / "studies" / "ranks"
    folder.mkdir(parents=True)
    arms = {"LoRA": arm([[3.0, 2.0], [3.0, 2.2]])}
    told = results(arms, missing=["r = 8: choose 0 0.01"])
    (folder / "results.json").write_text(json.dumps(told))
    page = findings.write(tmp_path).read_text()
    assert "Not run: r = 8: choose 0 0.01" in page and "2.1000" in page
    assert "studies/ranks/figure.png" in page
    assert "Not run at all: batch_sizes, budgets, decay" in page
    (folder / "results.json").write_text(json.dumps({**told, "smoke": True}))
    with pytest.raises(ValueError, match="at toy sizes"):
        findings.write(tmp_path)


def test_a_legend_lies_below_its_panel_and_steps_are_whole():
    figure = matplotlib.figure.Figure()
    axis = figure.subplots()
    axis.plot([1, 2, 3], [3, 2, 1], label="LoRA")
    axis.set(xlabel="step")
    axis.legend()
    panels.tidy(axis)
    figure.canvas.draw()
    legend = axis.get_legend().get_window_extent()
    assert legend.y1 < axis.get_window_extent().y0
    assert all(tick == round(tick) for tick in axis.get_xticks())
