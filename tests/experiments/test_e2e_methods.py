"""The study of eight methods: its wiring on a few rows, and what truncation leaves."""

import json
import math

import pytest

from experiments.studies import e2e_methods as study
from experiments.studies.method import comparison
from tests.data_paths import needs_data

pytestmark = pytest.mark.slow

SMALL = {
    "run.steps": 2,
    "data.train_rows": 64,
    "data.batch_size": 4,
    "data.lengths": (344,),
    "adapter.calibration_batches": 1,
}
FAST = ("LoRA",)
GRID = (1e-3, 1e-2)


@pytest.fixture(scope="module")
def setting():
    return study.make_setting(study.configured("LoRA", **SMALL), rows=8)


@needs_data
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(m, marks=() if m in FAST else pytest.mark.slow)
        for m in study.METHODS
    ],
)
def test_every_method_takes_its_runs(method, setting, tmp_path):
    fields = dict(SMALL)
    if method == "AdaLoRA":  # no room for a schedule in two steps
        options = {"target_budget": 140, "initial_warmup": 0, "final_steps": 0}
        fields["optimizer.wrap"] = (("adalora", options),)
    config = study.configured(method, **fields)
    runs = comparison.Runs(tmp_path / "runs.jsonl", {method: "x"})
    study.study(method, setting, runs, config, GRID)
    lines = {key: line["curve"][-1] for key, line in runs.lines.items()}
    assert all(math.isfinite(value) for value in lines.values())
    assert len([key for key in lines if key[1] == "report"]) == len(study.SEEDS)
    tried = {float(key[3]): v for key, v in lines.items() if key[1] == "choose"}
    ends = min(tried), max(tried)  # of two rates, either is at an edge
    inside = min(tried, key=tried.__getitem__) not in ends
    full = len(tried) == len(GRID) + comparison.WIDER
    assert len(tried) > len(GRID) and (inside or full)
    again = comparison.Runs(tmp_path / "runs.jsonl", {method: "x"}, minutes=-1)
    study.study(method, setting, again, config, GRID)  # nothing is left to run
    assert again.lines.keys() == runs.lines.keys()


def test_what_was_cut_short_is_named_and_gone_on_with(tmp_path):
    path = tmp_path / "runs.jsonl"
    runs = comparison.Runs(path, {"LoRA": "x"})
    runs.get(("LoRA", "choose", 0, 1e-3), lambda: [2.0, 1.0])
    results, missing = study.read(runs)
    assert not results
    assert missing[0] == "LoRA: choose 0 0.00316"
    assert len(missing) == len(study.METHODS)

    late = comparison.Runs(path, {"LoRA": "x"}, minutes=-1)
    assert late.get(("LoRA", "choose", 0, 1e-3)) == [2.0, 1.0]
    with pytest.raises(comparison.NotRun, match="choose 0 0.01"):
        late.get(("LoRA", "choose", 0, 1e-2), lambda: [1.0])
    assert not comparison.Runs(path, {"LoRA": "other settings"}).lines
    assert json.loads(path.read_text())["settings"] == "x"


@pytest.mark.parametrize(
    "scores, best",
    [
        ({1: 3, 2: 1, 4: 2, 8: 4}, 2),
        ({0.5: 1, 1: 2, 2: 3, 4: 3, 8: 4}, 0.5),
        ({1: 5, 2: 4, 4: 3, 8: 2, 16: math.nan}, 8),
    ],
    ids=["inside", "one more below", "one more above, diverged"],
)
def test_an_optimum_at_the_edge_gets_one_more_point(scores, best):
    assert comparison.best_of_grid(scores.__getitem__, (1, 2, 4, 8), 1) == best


@pytest.mark.parametrize(
    "optimum, widen, best",
    [(256, 1, 16), (256, 3, 64), (256, 9, 256), (1 / 32, 9, 1 / 32), (4, 9, 4)],
)
def test_a_grid_is_widened_while_the_best_lies_at_its_edge(optimum, widen, best):
    score = lambda rate: abs(math.log2(rate / optimum))
    assert comparison.best_of_grid(score, (1, 2, 4, 8), widen) == best


def test_runs_count_as_long_as_what_they_depend_on_stays():
    digest = lambda **fields: study._digest(study.configured("LoRA", **fields))
    same = digest()
    assert digest(**{"eval.batch_size": 7, "run.name": "x"}) == same
    for fields in ({"optimizer.b1": 0.8}, {"adapter.rank": 2}, {"run.steps": 3}):
        assert digest(**fields) != same
    others = {study._digest(study.configured(method)) for method in study.METHODS}
    assert len(others) == len(study.METHODS)
