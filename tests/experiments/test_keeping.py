"""A run that is stopped and started again ends as if never stopped."""

import json

import jax
import numpy as np
import pytest

from experiments.machine import preemption
from experiments.recipes import finetune
from experiments.trainer import metric_log, nonfinite
from lorax import checkpoint
from tests.data_paths import needs_data
from tests.experiments.test_finetune import config_of

pytestmark = pytest.mark.once

SMALL = {
    "data.train_rows": 64,
    "data.valid_rows": 8,
    "data.batch_size": 2,
    "data.packed": True,
    "eval.rows": 8,
    "eval.batch_size": 8,
    "eval.test": 0,
    "run.save_every": 2,
}


def config(**fields):
    return config_of("gpt2_e2e_lora", 5, **SMALL, **{"run.log_every": 1}, **fields)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, finetune.run(config(), str(folder))


@needs_data
def test_a_stopped_run_goes_on_bit_by_bit(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as told:
        stop = lambda self, step: step == 3
        told.setattr(preemption.Preemption, "should_stop", stop)
        with pytest.raises(SystemExit) as left:
            finetune.run(config(), str(tmp_path))
        assert left.value.code == preemption.EXIT_PREEMPTED
    assert not (tmp_path / "results.json").exists()
    with open(tmp_path / "metrics.jsonl", "a") as file:  # after the last save
        file.write(json.dumps({"run": "lora", "step": 4, "loss": 9.0}) + "\n")

    results = finetune.run(config(), str(tmp_path))
    folder, expected = whole
    for name in expected.keys() - {"step_ms"}:
        assert results[name] == expected[name]
    ours, theirs = (checkpoint.load_adapters(f / "adapter") for f in (tmp_path, folder))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    steps = lambda f: [
        (x["step"], x["loss"]) for x in metric_log.read(f) if "loss" in x
    ]
    assert steps(tmp_path) == steps(folder)
    assert [step for step, _ in steps(folder)] == [1, 2, 3, 4, 5]


@needs_data
def test_a_finished_run_is_only_reported_once_more(whole):
    folder, expected = whole
    again = finetune.run(config(), str(folder))
    assert "step_ms" not in again
    assert {k: v for k, v in expected.items() if k != "step_ms"} == again


@needs_data
def test_another_config_is_named(whole):
    folder, _ = whole
    with pytest.raises(ValueError, match=r"optimizer\.b1=0\.9, but this one has 0\.8"):
        finetune.run(config(**{"optimizer.b1": 0.8}), str(folder))


@needs_data
def test_losses_that_are_no_numbers_stop_the_run(tmp_path):
    wild = config(
        **{
            "optimizer.learning_rate.lora": 1e30,
            "optimizer.warmup_steps": 0,
            "run.skip_nonfinite": 1,
        }
    )
    with pytest.raises(nonfinite.NonFiniteError, match="the last of 2 in a row"):
        finetune.run(wild, str(tmp_path))
    (kept,) = tmp_path.glob("nonfinite-step-*.npz")
    with np.load(kept, allow_pickle=False) as batch:
        assert batch["batch/inputs"].shape == (2, 344)
