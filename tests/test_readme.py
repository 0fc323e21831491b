"""The examples of the README and of the page on other models run."""

import pathlib
import re

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]


def code_of(page):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    return code


def run(page):
    scope: dict = {}
    exec(compile(code_of(page), page, "exec"), scope)
    return scope


def test_the_example_runs_and_the_loss_falls():
    lines = [line for line in code_of("README.md").splitlines() if line.strip()]
    assert len(lines) <= 25
    scope = run("README.md")
    start = scope["loss_fn"](scope["params"], scope["batch"])
    assert scope["metrics"]["loss"] < 0.3 * start
    merged = scope["loss_fn"](scope["merged"], scope["batch"])
    trained = scope["state"].adapters
    adapted = scope["loss"](trained, scope["params"], scope["batch"])
    assert abs(merged - adapted) < 1e-5


def test_an_nnx_model_is_adapted_trained_saved_and_merged(capsys):
    scope = run("docs/foreign_models.md")
    assert "dot      blocks/0/attention/query/kernel" in capsys.readouterr().out
    classes = {path: type(a).__name__ for path, a in scope["adapters"].items()}
    assert classes["blocks/1/attention/value/kernel"] == "Lora"
    assert classes["blocks/1/up/kernel"] == "Dora"
    assert classes["head/bias"] == "Full"
    assert scope["losses"][-1] < 0.8 * scope["losses"][0]
    logits = scope["adapted"](scope["tokens"])
    merged = scope["lorax"].merge(scope["state"].adapters, scope["params"])
    expected = scope["nnx"].merge(scope["graph"], merged, scope["rest"])
    np.testing.assert_array_equal(logits, expected(scope["tokens"]))
