"""Studies of single claims: run at toy sizes, numbers by hand, the page."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax
from experiments import paired
from experiments.studies.claims import (
    projected_steps,
    subspaces,
    unequal_ranks,
    walks,
    width_exponent,
)
from experiments.studies.method import comparison, scorecard
from lorax import optim

pytestmark = pytest.mark.once


def claim(values, **of):
    return scorecard.Claim("It falls", "1234.56789", "a number", values, **of)


def test_a_verdict_is_where_the_interval_lies():
    values = np.array([0.9, 1.0, 1.1])  # 1 +- 4.303 * 0.1 / sqrt(3) = 0.248
    assert paired.interval(values) == pytest.approx((1.0, 0.24843), rel=1e-4)
    assert scorecard.verdict(claim(values, low=0.75)) == "shown"
    assert scorecard.verdict(claim(values, low=0.76)) == "not shown"
    assert scorecard.verdict(claim(values, high=0.75)) == "contradicted"
    assert scorecard.verdict(claim([1.0, np.nan, 1.0], low=0.0)) == "not shown"
    told = scorecard.row(claim(values, low=0.0), "x/runs.jsonl")
    assert told[0] == "It falls ([1234.56789](https://arxiv.org/abs/1234.56789))"
    assert told[2:] == ["+1.000", "+0.752 to +1.248", "shown", "[runs](x/runs.jsonl)"]
    away = claim(values)._replace(paper="https://a.page/1")
    assert "([a.page/1](https://a.page/1))" in scorecard.row(away, "x")[0]


def test_the_page_has_a_row_for_every_claim_and_refuses_toy_results(tmp_path):
    folder = tmp_path / "results" / "studies" / "inits"
    folder.mkdir(parents=True)
    ends = {"LoRA": [2.0, 2.1], "PiSSA": [1.0, 1.1], "LoRA-GA": [3.0, 3.1]}
    arms = {k: {"curves": [[9.0, x] for x in v]} for k, v in ends.items()}
    found = {"arms": arms, "steps": 7, "cpu_hours": 0.5, "smoke": False}
    (folder / "results.json").write_text(json.dumps(found))
    page = scorecard.write(tmp_path).read_text()
    rows = [line.split(" | ") for line in page.splitlines() if "byte model" in line]
    assert [row[-2] for row in rows] == ["shown", "contradicted"]  # OLoRA is absent
    assert rows[0][2:4] == ["-1.000", "-1.000 to -1.000"]
    command = "`python -m experiments.studies.run --study=inits --study_dir="
    assert f"1800 CPU-seconds, {command}docs/results/studies`" in page
    (folder / "results.json").write_text(json.dumps({**found, "smoke": True}))
    with pytest.raises(ValueError, match="at toy sizes"):
        scorecard.write(tmp_path)


def test_full_fine_tuning_walks_with_itself():
    shapes, seeds = ((6, 5), (5, 4)), np.array([3, 4])
    target = lorax.Target(".*", adapter="full")
    made = walks.make_walk(
        shapes, target, lambda rate, _: optax.sgd(rate), optax.sgd(1.0), steps=6
    )
    assert walks.entries(shapes) == 50
    first = made(seeds, 0.5, 0.05, 0.0, jnp.zeros((2, 6, 50)))
    again = made(seeds, 0.5, 0.05, 0.0, first.changes)
    np.testing.assert_allclose(again.step, 1, atol=1e-5)
    np.testing.assert_allclose(again.change, 1, atol=1e-5)
    assert np.all(again.error < 1)
    slower = made(seeds, 0.5, 0.01, 0.0, first.changes)
    assert np.all(slower.change[:, -1] < 0.9999)


def test_the_undamped_projection_reaches_what_a_pair_can():
    rng = np.random.default_rng(0)
    a, b, g = (rng.normal(size=shape) for shape in ((6, 2), (2, 5), (6, 5)))
    given = [jnp.asarray(x, jnp.float32) for x in (a, b)]
    adapters = {"w": lorax.Lora(*given, 1.5, lorax.Axes((0,), (1,)))}
    columns, rows = np.linalg.qr(a)[0], np.linalg.qr(b.T)[0]
    beyond = (np.eye(6) - columns @ columns.T) @ g @ (np.eye(5) - rows @ rows.T)
    share = np.linalg.norm(g - beyond) / np.linalg.norm(g)
    found = walks.reachable(adapters, {"w": jnp.asarray(g, jnp.float32)})
    np.testing.assert_allclose(found, share, rtol=1e-5)
    raw = {"a": 1.5 * g @ b.T, "b": 1.5 * a.T @ g}
    raw = {name: jnp.asarray(x, jnp.float32) for name, x in raw.items()}
    grads = {"w": adapters["w"].replace(**raw)}
    tx = optim.lora_pro(1.0, "sgd", damping=0.0)
    updates, _ = tx.update(grads, tx.init(adapters), adapters)
    step = updates["w"].a @ b + a @ updates["w"].b
    cosine = -np.sum(step * g) / np.linalg.norm(step) / np.linalg.norm(g)
    np.testing.assert_allclose(cosine, share, rtol=1e-4)


def test_the_ceiling_of_a_change_by_hand(monkeypatch):
    monkeypatch.setattr(walks, "RANK", 1)
    shapes = (2, 2), (1, 2)
    change = np.array([3.0, 0, 0, 4.0, 0, 2.0])  # keeps 4 of (3, 4), and 2
    ceiling = walks.best_of_rank(change, shapes)
    assert ceiling == pytest.approx(math.sqrt((16 + 4) / 29))


def test_a_study_of_steps_is_chosen_reported_resumed_and_told(tmp_path, monkeypatch):
    arms = {k: projected_steps.SGD[k] for k in ("full fine-tuning", "LoRA")}
    arms["LoRA-Pro 0.01"] = projected_steps.Arm("sgd", 0.01)
    cells = tuple(projected_steps.Cell(r, "toy", 1.0) for r in ("SGD, one rate", "SGD"))
    for name, value in {
        "PROBLEMS": {"toy": ((10, 8),)},
        "STEPS": 15,
        "CHOOSE": (100, 101),
        "REPORT": (0, 1),
        "CELLS": cells,
        "ARMS": {"SGD, one rate": arms, "SGD": arms},
        "GRIDS": {"SGD": (0.05, 0.1)},
        "CLAIMED": projected_steps.CLAIMED[:2],
        "DREW": {cells[0]: tuple(arms)},
    }.items():
        monkeypatch.setattr(projected_steps, name, value)
    projected_steps.make_walk.cache_clear()
    digests = {name: projected_steps.digest(arm) for name, arm in arms.items()}
    runs = comparison.Runs(tmp_path / "runs.jsonl", digests)
    found = projected_steps.results(runs)
    projected_steps.make_walk.cache_clear()
    one, own = found["cells"].values()
    assert len({arm["rate"] for arm in one.values()}) == 1
    best = own["LoRA"]["grid"]
    assert best[f"{own['LoRA']['rate']:.3g}"] == min(best.values())
    assert all(len(arm["error"]) == 2 for arm in own.values())
    again = comparison.Runs(tmp_path / "runs.jsonl", digests, minutes=-1)
    assert projected_steps.results(again) == found  # nothing is rerun
    rows = projected_steps.claims(found)
    assert len(rows) == 8 and rows[0].low == 0 and rows[3].high == 0
    assert "## SGD: toy, noise 1" in projected_steps.page(found)
    projected_steps.draw(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5_000


def test_the_least_error_of_a_ratio_is_that_of_its_best_rates(tmp_path, monkeypatch):
    for name, value in {
        "WIDTHS": (8, 16),
        "SEEDS": (0, 1),
        "STEPS": 6,
        "RATIOS": (-1, 0, 1, 12),
        "PRODUCTS": (-6, -4, -2),
    }.items():
        monkeypatch.setattr(width_exponent, name, value)
    width_exponent.profile.clear_cache()
    runs = comparison.Runs(tmp_path / "runs.jsonl", {"wide": "x", "few inputs": "x"})
    regimes = {
        name: width_exponent.study(name, runs) for name in ("wide", "few inputs")
    }
    width_exponent.profile.clear_cache()
    assert np.shape(regimes["wide"]["profiles"]) == (2, 4)
    assert np.min(regimes["wide"]["profiles"]) < -1  # it learns
    found = {"regimes": regimes, "cpu_seconds": 1}
    assert "| wide | 0.5 |" in width_exponent.page(found)
    assert len(width_exponent.claims(found)) == 2 * 2 * 2
    monkeypatch.setattr(width_exponent, "REGIMES", dict.fromkeys(regimes, 0.5))
    width_exponent.draw(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5_000


@pytest.mark.parametrize("regime", ["wide", "fixed norm"])
def test_the_expected_error_is_that_of_a_dense_change(regime):
    """The quadratic form in r x r products, against n x n ones in numpy."""
    n, rank = 12, width_exponent.RANK
    keys = jax.random.split(jax.random.key(1), 3)
    drawn = [np.asarray(jax.random.normal(k, s), float) for k, s in zip(
        keys, ((n, rank), (rank, n)), strict=False
    )]  # fmt: skip
    u, v = np.linalg.qr(drawn[0])[0], drawn[1]
    v *= np.sqrt(1 / n) if regime == "fixed norm" else np.sqrt(1 / rank)
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(n, rank)) / 4, rng.normal(size=(rank, n)) / 4
    loss = width_exponent.problem(regime, n, jax.random.key(1))
    got = loss(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    # signs of QR columns depend on the library: take the ones that fit
    signs = itertools.product((1, -1), repeat=rank)
    by_hand = [np.sum((a @ b - u * s @ v) ** 2) / np.sum(v**2) for s in signs]
    assert min(abs(x - float(got)) for x in by_hand) < 1e-4


def test_the_largest_good_ratio_is_interpolated(monkeypatch):
    monkeypatch.setattr(width_exponent, "RATIOS", (0, 1, 2, 3))
    # the limit is -3 + 1, crossed half way from ratio 2^2 (-3) to 2^3 (-1)
    assert width_exponent.largest(np.array([-1.0, -2.5, -3.0, -1.0])) == 2.5
    with pytest.raises(ValueError, match="widen RATIOS"):
        width_exponent.largest(np.array([-1.0, -2.0, -3.0, -2.9]))
    monkeypatch.setattr(width_exponent, "WIDTHS", (64, 256))
    logs = np.array([[1.0, 2.0], [2.0, 2.0]])  # over two octaves of width
    np.testing.assert_allclose(width_exponent.slopes(logs), [0.5, 0.0], atol=1e-12)


def test_a_study_of_ranks_learns_counts_and_resumes(tmp_path, monkeypatch):
    problem = unequal_ranks.PROBLEM._replace(shape=(12, 12), ranks=(3, 1), noise=0.1)
    lora = unequal_ranks.Arm(2)
    arms = {"LoRA": lora, "AdaLoRA": unequal_ranks.Arm(4, "decoupled", 0.3, 5)}
    for name, value in {
        "PROBLEM": problem,
        "BUDGET": 4,
        "CHOOSE": (7,),
        "GRID": (0.02, 0.04),
        "ARMS": arms,
        "REPORT": (0, 1),
    }.items():
        monkeypatch.setattr(unequal_ranks, name, value)
    unequal_ranks.make_run.cache_clear()
    digests = {name: unequal_ranks.digest(arm) for name, arm in arms.items()}
    path = tmp_path / "runs.jsonl"
    own = {
        name: unequal_ranks.study(name, 120, comparison.Runs(path, digests))
        for name in arms
    }
    unequal_ranks.make_run.cache_clear()
    assert np.mean(own["LoRA"]["final"]) > 0.2  # 1 of 4 is beyond its ranks
    assert np.mean(own["AdaLoRA"]["final"]) < np.mean(own["LoRA"]["final"])
    assert [sum(ranks) for ranks in own["AdaLoRA"]["ranks"]] == [4, 4]
    late = comparison.Runs(path, digests, minutes=-1)
    assert unequal_ranks.study("AdaLoRA", 120, late) == own["AdaLoRA"]
    assert "| AdaLoRA |" in unequal_ranks.table(own)
    rows = unequal_ranks.claims({"lengths": {"120": own}})
    assert [row.number for row in rows] == [
        "relative distance, AdaLoRA minus LoRA; 120 steps"
    ]


def test_directions_and_amplification_by_hand(tmp_path, monkeypatch):
    """Updates with one direction each: e0 e0^T of size 4, and e1 e0^T."""

    def one_direction(place):
        a = jnp.zeros((2, 10, 8)).at[:, place, 0].set(2.0)
        b = jnp.zeros((2, 8, 10)).at[:, 0, 0].set(2.0)
        return {"k": lorax.Lora(a, b, 1.0, lorax.Axes((1,), (2,), (0,)))}

    base = {"k": jnp.zeros((2, 10, 10)).at[:, 0, 0].set(jnp.array([0.5, 1.0]))}
    places = {(8, 1): 0, (64, 1): 0, (64, 2): 1}

    def train(setting, problem, rank, seed):
        return one_direction(places[rank, seed]), base

    problem = subspaces.Problem("banking77", 1, (10, 10))
    monkeypatch.setattr(subspaces, "train", train)
    monkeypatch.setattr(subspaces, "PROBLEMS", {"toy": problem})
    path = tmp_path / "runs.jsonl"
    runs = comparison.Runs(path, subspaces.digests())
    found = subspaces.study(lambda task: None, runs)
    numbers = found["toy"]
    assert numbers["rank 8 and 64, in: phi(1, 1)"] == pytest.approx(
        {"k, layer 0": 1.0, "k, layer 1": 1.0}
    )
    ends = {side: f"two seeds, {side}: phi(1, 1)" for side in ("in", "out")}
    assert numbers[ends["in"]]["k, layer 0"] == pytest.approx(0, abs=1e-6)
    assert numbers[ends["out"]]["k, layer 0"] == pytest.approx(1)
    own = numbers["amplification, rank 8"]
    assert own == pytest.approx({"k, layer 0": 8.0, "k, layer 1": 4.0}, rel=1e-4)
    late = comparison.Runs(path, subspaces.digests(), minutes=-1)
    assert subspaces.study(lambda task: None, late) == found
    told = {"numbers": found, "authors": {"q": 1.5, "v": 2.5}, "cpu_seconds": 3}
    page = subspaces.page(told)
    assert "| amplification, rank 8 | 6.000 +- 25.412 | 4.000 | 8.000 |" in page
    assert "| stable rank | 2.000 +- 6.353 | 1.500 | 2.500 |" in page
    rows = {
        claim.number.split(";")[0]: claim.values for claim in subspaces.claims(told)
    }
    first = rows["log2 of the amplification at rank 8"]
    np.testing.assert_allclose(first, [3.0, 2.0], rtol=1e-4)  # log2 of 8, 4
    lower = rows["log2 of the amplification, rank 8 minus 64"]
    np.testing.assert_allclose(lower, 0.0, atol=1e-4)
    alike = rows["phi(8, 8) of updates of rank 64 minus 8/10, outputs"]
    np.testing.assert_allclose(
        alike, np.array(list(numbers["two seeds, out: phi(8, 8)"].values())) - 0.8
    )
