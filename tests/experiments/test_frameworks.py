"""Train steps of other libraries match lorax's, and the tables are right."""

import json

import jax
import numpy as np
import pytest

from experiments.benchmarks import frameworks, page
from experiments.benchmarks.cases import gpt2_shaped as gpt2
from experiments.benchmarks.rivals import (
    agreement,
    jax_rivals,
    profiles,
    torch_peft,
    trainers,
)
from experiments.machine import tables, timing

pytestmark = pytest.mark.slow

SHAPE = gpt2.Shape(layers=2, width=32, heads=4, vocabulary=32, batch=2, time=8, rank=4)
METHODS = ("lora", "dora", "adalora", "full")

needs_torch = pytest.mark.skipif(
    not torch_peft.available(), reason="torch or peft is not installed"
)


@pytest.fixture(scope="module")
def results():
    """Every method's comparison, after checking that its programs agree."""
    if torch_peft.available():
        torch_peft.pin(1)
    setting, compile_ = frameworks.Setting(), jax.stages.Lowered.compile
    fast = lambda self: compile_(self, {"xla_backend_optimization_level": 0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", fast)
        return {m: frameworks.compare(m, SHAPE, setting, rounds=2) for m in METHODS}


def test_nnx_agrees(results):
    assert "flax.nnx.LoRA" in results["lora"]["seconds"], results["lora"]["not_run"]


@needs_torch
@pytest.mark.parametrize("method", METHODS)
def test_steps_agree_with_those_of_peft(results, method):
    name = "PyTorch" if method == "full" else "PEFT + PyTorch"
    errors = results[method]["errors"]
    assert 0 < errors[name] < 100 * np.finfo(np.float32).eps
    assert results[method]["deviation"] == max(errors.values())
    assert len(results[method]["seconds"][name]) == 2


def test_the_table_has_a_row_for_every_program(results):
    lines = frameworks.table(results).splitlines()
    rows = [line.split(" | ") for line in lines]
    assert {len(row) for row in rows} == {8}
    names = [row[0].removeprefix("| ") for row in rows[2:]]
    for method in METHODS:
        assert f"{method}, lorax" in names
    assert {"adalora, lorax, its own penalty", "full, JAX by hand"} <= set(names)
    for rival in jax_rivals.RIVALS:
        assert any(name.startswith(f"lora, {rival}") for name in names)


def test_ratios_are_lorax_over_the_other_program():
    seconds = {"lorax": [1.0, 3.0, 2.0], "PEFT + PyTorch": [2.0, 3.0, 8.0]}
    built = {"lorax": 4.0, "PEFT + PyTorch": 0.0}
    result = {"seconds": seconds, "build_seconds": built, "not_run": {"qwix": "why"}}
    *_, lorax, peft, qwix = frameworks.table({"lora": result}).splitlines()
    assert lorax == "| lora, lorax | 4.0 | 1000 | 2000 | 1000-3000 | - | - | - |"
    assert peft.startswith("| lora, PEFT + PyTorch | - | 2000 | 3000 | 2000-8000 |")
    assert peft.endswith("| 0.50 | 0.50 | 0.25-1.00 |")
    assert qwix == "| lora, qwix: not run, why" + " | -" * 7 + " |"


def test_a_rival_that_is_not_there_is_named_with_the_reason(monkeypatch):
    def absent(case, shape):
        raise ImportError("No module named 'rival'")

    fake = trainers.Trainer(float, dict, 0.0)
    monkeypatch.setattr(trainers, "of_lorax", lambda *args: fake)
    monkeypatch.setattr(jax_rivals, "RIVALS", {"rival": absent})
    monkeypatch.setattr(torch_peft, "available", lambda: False)
    made = frameworks.contest("lora", SHAPE, frameworks.Setting())
    assert made.missing == {
        "PEFT + PyTorch": "torch or peft is not installed",
        "rival": "ImportError: No module named 'rival'",
    }
    assert list(made.trainers) == ["lorax"]


def test_disagreement_is_judged_by_what_the_best_program_reaches():
    exact = {("w/kernel", "a"): np.ones(2)}
    reference = trainers.Reference(1.0, exact)

    def program(off, loss=1.0):
        moments = {
            name: (1 - trainers.BETA1) * (value + off) for name, value in exact.items()
        }
        return trainers.Trainer(lambda: loss, lambda: moments, 0.0)

    require = lambda alike=(), **made: agreement.require(made, dict(alike), reference)
    found = require(one=program(2e-5), other=program(1.9e-4))
    assert found.gradients["other"] == pytest.approx(1.9e-4, rel=1e-6)
    assert found.limit == pytest.approx(2e-4, rel=1e-6)
    with pytest.raises(
        AssertionError, match=r"w/kernel is 2\.1e-04 off.*allows 2\.0e-04"
    ):
        require(one=program(2e-5), other=program(2.1e-4))
    with pytest.raises(AssertionError, match="other: the gradient of w/kernel is nan"):
        require(one=program(2e-5), other=program(np.nan))
    # errors below float32's own rounding are not distinguished
    require(one=program(1e-9), other=program(1e-6))
    require(one=program(2e-5), other=program(1.0), alike={"other": False})
    with pytest.raises(AssertionError, match="tolerance"):
        require(one=program(2e-5), louder=program(2e-5, loss=1.001))
    strange = trainers.Trainer(lambda: 1.0, lambda: {("v", "a"): np.ones(2)}, 0.0)
    with pytest.raises(AssertionError, match="strange trains"):
        require(one=program(2e-5), strange=strange)


@needs_torch
def test_the_profile_has_a_row_for_every_framework():
    torch_peft.pin(1)
    parts = profiles.measured("none", SHAPE, "float32", rounds=2)
    assert np.shape(parts["PyTorch"]["gradient"]) == (2, 4)
    lines = profiles.table({"none": parts}).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| none, lorax",
        "| none, PyTorch",
    ]


def test_what_a_table_is_of_can_be_read():
    facts = tables.about(["jax", "surely-not-installed"])
    assert set(facts["versions"]) == {"python", "jax"}
    assert facts["date"] in tables.caption(facts)
    wall, cpu, kernel, faults = timing.usage()
    assert 0 <= kernel <= cpu and wall > 0 and faults >= 0


def test_the_page_has_every_file_that_is_there(results, tmp_path):
    facts = tables.about(["jax"])
    told = {"about": facts, "steps": results}
    (tmp_path / "frameworks_amd.json").write_text(json.dumps(told))
    written = page.write(tmp_path).read_text()
    assert frameworks.table(results) in written and tables.caption(facts) in written
    assert "malloc" not in written.split("## ", 1)[1]
