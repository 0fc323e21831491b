"""What is written is read back."""

import json
import math
import sys
import types

import pytest

from experiments.trainer import metric_log


def test_lines_round_trip_and_nan_stays_json(tmp_path):
    with metric_log.Writer(tmp_path) as writer:
        writer.write("lora", 10, {"loss": 2.5, "skipped": 0})
        writer.write("full", 20, {"loss": math.nan})
    lines = metric_log.read(tmp_path)
    assert [(r["run"], r["step"], r["loss"]) for r in lines] == [
        ("lora", 10, 2.5),
        ("full", 20, None),
    ]
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))


def test_a_second_run_replaces_the_first(tmp_path):
    pytest.importorskip("tensorboardX")
    for loss in (1.0, 2.0):
        with metric_log.Writer(tmp_path) as writer:
            writer.write("lora", 1, {"loss": loss})
    assert [line["loss"] for line in metric_log.read(tmp_path)] == [2.0]
    assert len(list(tmp_path.glob("tensorboard/lora/events.out.tfevents.*"))) == 1


def test_without_tensorboard_lines_are_still_written(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with metric_log.Writer(tmp_path) as writer:
        writer.write("lora", 1, {"loss": 1.0})
    assert len(metric_log.read(tmp_path)) == 1
    assert not (tmp_path / "tensorboard").exists()


class StandIn(types.ModuleType):
    """Records the calls to wandb."""

    def __init__(self):
        super().__init__("wandb")
        self.begun, self.told, self.finished = [], [], 0

    def init(self, **given):
        self.begun.append(given)
        return self

    def define_metric(self, name, step_metric):
        self.told.append((name, step_metric))

    def log(self, values):
        self.told.append(values)

    def finish(self):
        self.finished += 1


def test_wandb_gets_every_scalar_and_a_run_that_goes_on_its_old_id(
    tmp_path, monkeypatch
):
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (tmp_path / "run.json").write_text('{"config": {"run": {"steps": 3}}}')
    for fresh in (True, False):
        with metric_log.Writer(tmp_path, fresh, "mine") as writer:
            writer.write("lora", 10, {"loss": 2.5})
    first, second = wandb.begun
    assert first == second and len(first["id"]) == 16 and first["project"] == "mine"
    assert first["name"] == tmp_path.name and first["config"] == {"run": {"steps": 3}}
    assert wandb.told[:2] == [
        ("lora/*", "lora/step"),
        {"lora/loss": 2.5, "lora/step": 10},
    ]
    assert wandb.finished == 2


def test_wandb_that_is_not_installed_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="run.wandb='mine'.*pip install wandb"):
        metric_log.Writer(tmp_path, project="mine")
