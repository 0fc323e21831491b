"""Two processes with two devices each: one checkpoint, one decision, one stop."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from lorax.checkpoint import RunCheckpoints, load_adapters
from tests import children
from tests.checkpoint.states import base, filled, fresh, same

SAID = ("whole ", "one ", "both ", "stopped ")


@pytest.mark.once
def test_two_processes_agree(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    module = [sys.executable, "-m", "tests.checkpoint.two_processes", port]
    env = children.environment()
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pair = [
        subprocess.Popen(
            [*module, str(i), str(tmp_path)], cwd=children.ROOT, env=env, **pipe
        )
        for i in range(2)
    ]
    try:
        outputs = [child.communicate(timeout=240) for child in pair]
    finally:
        for child in pair:
            child.kill()
    for child, (_, errors) in zip(pair, outputs):
        assert child.returncode == 0, errors[-4000:]
    # gloo's output may be interleaved, even within a line
    ours = lambda out: [x for x in out.split("\n") if x.startswith(SAID)]
    lines = (ours(out) for out, _ in outputs)
    one, two = lines
    assert one == two, "the processes differ"
    assert len(one) == 4 and one[:3] == ["whole 6 0", "one 3 1", "both 3 1"]
    stopped, *steps = map(int, one[3].removeprefix("stopped ").split())
    assert steps == [3, stopped] and 8 <= stopped < 399
    # and one process reads what two have written
    with RunCheckpoints(tmp_path / "run", base()) as run:
        assert same(run.restore(fresh()).state, filled(stopped, stopped))
    adapters = load_adapters(tmp_path / "adapters", params=base())
    assert same(adapters, filled(1, 1).adapters)
