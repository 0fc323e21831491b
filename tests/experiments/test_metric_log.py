"""What is written is read back."""

import json
import math

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
