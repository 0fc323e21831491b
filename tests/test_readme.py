"""The README keeps its promises: its example runs, and learns."""

import pathlib
import re

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_example_runs_and_the_loss_falls():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(code.strip().splitlines()) <= 36
    scope: dict = {}
    exec(compile(code, str(README), "exec"), scope)
    start = scope["loss_fn"](scope["params"], scope["batch"])
    assert scope["value"] < 0.3 * start
    merged = scope["loss_fn"](scope["merged"], scope["batch"])
    assert abs(merged - scope["loss"](scope["adapters"], scope["params"], scope["batch"])) < 1e-5
