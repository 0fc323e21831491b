"""The README keeps its promises: its example runs, and learns."""

import pathlib
import re

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_example_runs_and_the_loss_falls():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    scope: dict = {}
    exec(compile(code, str(README), "exec"), scope)
    start = scope["loss_fn"](scope["params"], scope["batch"])
    assert scope["metrics"]["loss"] < 0.3 * start
    merged = scope["loss_fn"](scope["merged"], scope["batch"])
    trained = scope["state"].adapters
    adapted = scope["loss"](trained, scope["params"], scope["batch"])
    assert abs(merged - adapted) < 1e-5
