"""The benchmark on pretrained models: run at toy size, its rows computed by hand."""

import ml_collections
import numpy as np
import pytest

from configs import minilm_banking_lora
from experiments.studies import benchmark
from experiments.studies.pretrained import (
    accounting,
    arms,
    bases,
    leaderboard,
    outcomes,
    verdicts,
)
from tests.data_paths import needs_data

pytestmark = pytest.mark.once

TOY = {
    "model.source": "",
    "model.random": ml_collections.ConfigDict(minilm_banking_lora.TINY),
    "data.lengths": (32,),
    "data.batch_size": 4,
    "eval.batch_size": 8,
    "run.steps": 10,
    "optimizer.warmup_steps": 1,
    "adapter.calibration_batches": 1,
}


def toy(*only):
    task = bases.TASKS["banking77"]
    fields = {**task.fields, **TOY}
    return task._replace(fields=fields, matrices=12, choose=16, report=16, only=only)


@pytest.mark.parametrize("name", bases.TASKS)
def test_every_arm_is_a_config_with_four_rates_and_a_digest_of_its_own(name):
    task = bases.TASKS[name]
    every = bases.arms_of(task)
    for arm in every.values():
        config = bases.configured(task, arm)
        assert config.run.steps == task.fields["run.steps"]
        steps = np.diff(np.log10(arm.rates))
        np.testing.assert_allclose(steps, [0.5] * 3, rtol=1e-6)
    assert len({bases.digest(task, arm) for arm in every.values()}) == len(every)
    if not task.only:
        assert set(verdicts.VARIANTS) <= set(every)


def test_a_digest_is_of_values_and_not_of_names_or_rates():
    task = toy("LoRA")
    arm = bases.arms_of(task)["LoRA"]
    same = arm._replace(rates=(1.0,), differs="otherwise")
    assert bases.digest(task, same) == bases.digest(task, arm)
    assert bases.digest(task._replace(choose=8), arm) != bases.digest(task, arm)
    ranked = arm._replace(fields={"adapter.rank": 2})
    assert bases.digest(task, ranked) != bases.digest(task, arm)
    # The digests in runs.jsonl: these runs must not be thrown away.
    real = bases.TASKS["banking77"]
    digest = bases.digest(real, bases.arms_of(real)["LoRA"])
    assert digest == "08b9040c51946823"


@needs_data
@pytest.mark.filterwarnings("ignore:.*cut .* of .* examples")
def test_an_arm_runs_goes_on_and_is_reported(tmp_path, monkeypatch):
    task = toy("LoRA", "head only", "AdaLoRA")
    monkeypatch.setattr(bases, "TASKS", {"banking77": task})
    folder = tmp_path / "results" / "benchmark" / "banking77"
    folder.mkdir(parents=True)
    setting, runs = bases.make_setting(task), leaderboard.runs(folder, task)
    found = benchmark.go_on("head only", task, setting, runs)
    assert found.scores.shape == (3,) and (found.scores <= 100).all()
    assert len(runs.lines) >= 4 + len(outcomes.SEEDS)
    again = leaderboard.runs(folder, task, minutes=-1)
    np.testing.assert_array_equal(
        benchmark.go_on("head only", task, setting, again).scores, found.scores
    )
    costs = benchmark.costs(task, setting, folder / "costs.json")
    # a hidden layer of 32, and 77 labels
    assert costs["head only"]["trained"] == 32 * 32 + 32 + 32 * 77 + 77
    # two layers: rank 8 on four kernels of 32 x 32 and two of 32 x 64
    low_rank = 2 * 8 * (4 * 64 + 2 * 96)
    assert costs["LoRA"]["trained"] - costs["head only"]["trained"] == low_rank
    assert costs["head only"]["operations"] < costs["LoRA"]["operations"]
    assert 8 * costs["LoRA"]["trained"] <= costs["LoRA"]["state"]  # Adam's moments
    benchmark.keep(folder / "costs.json", costs)
    assert benchmark.costs(task, None, folder / "costs.json") == costs  # reused
    page = leaderboard.write(tmp_path).read_text()
    assert "1 of 3 arms are complete" in page
    assert "| LoRA | - | - | not run yet | - |" in page
    assert f"| {found.rate:.2g} | {found.scores.mean():.2f} +-" in page
    figure = tmp_path / "results/benchmark/figure.png"
    assert not figure.exists()  # nothing to compare with
    both = {"LoRA": LORA, "head only": found}
    standing = outcomes.Standing(both, {}, None, {}, 0, 0.0)
    leaderboard.draw({"banking77": (task, standing)}, folder.parent)
    assert figure.stat().st_size > 5_000


@needs_data
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*cut .* of .* examples")
@pytest.mark.parametrize("name", arms.methods(10, 12))
def test_every_method_takes_its_steps(name):
    task = toy(name)
    setting, arm = bases.make_setting(task), bases.arms_of(task)[name]
    line = benchmark.maker(arm, task, setting)("report", 1, arm.rates[0])
    assert 0 <= line["curve"][-1] <= 100


@needs_data
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*cut .* of .* examples")
def test_steps_are_timed_side_by_side():
    task = toy("LoRA", "PiSSA", "full")
    ms = accounting.times(task, bases.make_setting(task), rounds=2)
    assert set(ms) == {"LoRA", "PiSSA", "full"} and min(ms.values()) > 0


def outcome(*scores, rate=1e-3):
    return outcomes.Outcome(rate, np.array(scores))


LORA = outcome(10.0, 11.0, 12.0, rate=3e-3)


def test_claims_by_hand():
    finished = {
        "LoRA": LORA,
        "full": outcome(9.0, 9.0, 9.0, rate=3e-4),
        "DoRA": outcome(10.1, 11.1, 12.1),  # + 0.1, with zero width
        "PiSSA": outcome(13.0, 14.0, 15.0),  # + 3
        "OFT": outcome(9.0, 12.0, 13.0),  # + 1/3 +- 4.303 x 2/3
        "LoRA r = 1": outcome(11.0, 12.0, 13.0),
        "LoRA r = 64": outcome(10.5, 11.5, 12.5),
    }
    every = bases.arms_of(bases.TASKS["banking77"])
    alike, unbeaten, ten, rank, mlp = verdicts.verdicts(finished, every, percent=True)
    assert alike.found == (
        "minus LoRA +0.10 to +3.00; of 3 intervals 1 lie within 2, 1 (PiSSA) beyond"
    )
    assert alike.verdict == "contradicted"
    assert unbeaten.found == (
        "of 3 2 (DoRA, PiSSA) are worse and none better; 2 are not better by 1, by "
        "their intervals"
    )
    assert unbeaten.verdict == "not shown"  # 3 of 14 have been run
    assert ten.found.startswith("10 times;") and ten.verdict == "shown"
    assert rank.found == "LoRA r = 1 minus LoRA r = 64: +0.50 +- 0.00"
    assert rank.verdict == "shown" and mlp.verdict == "not run"
    few = verdicts.verdicts(finished, ("LoRA", "rsLoRA"), percent=True)
    assert [row.claimed for row in few] == [alike.claimed, unbeaten.claimed]


def test_a_difference_of_other_scores_is_in_percent_of_loras():
    finished = {"LoRA": outcome(0.5, 0.4, 0.6), "DoRA": outcome(0.51, 0.42, 0.63)}
    mean, half = verdicts.interval(finished, "DoRA", "LoRA", percent=False)
    # differences 2, 4 and 6 % of 0.5: standard error 2 / sqrt(3), t = 4.303
    np.testing.assert_allclose([mean, half], [4.0, 4.9687], rtol=1e-4)


def test_the_share_of_fulls_gain_by_hand():
    finished = {"LoRA": outcome(1.1, 1.1, 1.1), "full": outcome(1.0, 1.0, 1.0)}
    (gained, _) = verdicts.verdicts(finished, finished, percent=False, base=3.0)
    assert gained.found == "95.0% +- 0.0%" and gained.verdict == "shown"
    finished["LoRA"] = outcome(1.1, 1.5, 1.4)
    assert verdicts.verdicts(finished, finished, False, 3.0)[0].verdict == "not shown"


def test_what_has_not_been_run_has_its_row():
    standing = outcomes.Standing({}, {"LoRA": 0}, None, {}, 0, 0.0)
    (row,) = leaderboard.table(toy("LoRA"), standing, {}, {}).splitlines()[2:]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["LoRA", "-", "-", "not run yet", *"----", "not measured"]
    begun = standing._replace(missing={"LoRA": 5})
    assert "5 runs so far" in leaderboard.table(toy("LoRA"), begun, {}, {})
