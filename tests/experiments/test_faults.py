"""Processes that die: the others exit, and the same command resumes (slow).

Two processes with four devices each, started one by one, without a launcher.
"""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments.machine import launching, preemption
from experiments.trainer import metric_log
from lorax import checkpoint
from tests.data_paths import needs_data

FIELDS = {
    "run.steps": 60,
    "run.log_every": 1,
    "run.save_every": 3,
    "run.save_keep": 4,
    "data.train_rows": 96,
    "data.valid_rows": 8,
    "data.batch_size": 4,
    "data.packed": True,
    "data.lengths": "(344,)",
    "eval.rows": 8,
    "eval.batch_size": 8,
    "eval.test": 0,
    "eval.every": 0,
    "sharding.data": 2,
    "sharding.fsdp": 2,
    "sharding.tensor": 2,
}
pytestmark = [needs_data, pytest.mark.slow]


def start(folder):
    """The two processes."""
    port = launching.free_port()
    command = [
        *(sys.executable, "-m", "experiments.main", f"--workdir={folder}"),
        "--config=configs/gpt2_e2e_lora.py:runlocal",
        *(f"--config.{name}={value}" for name, value in FIELDS.items()),
    ]
    made = []
    for i in range(2):
        with open(folder.parent / f"{folder.name}-{i}.log", "a") as log:
            environment = launching.environment(i, 2, 4, port)
            made.append(
                subprocess.Popen(
                    command, env=environment, stdout=log, stderr=subprocess.STDOUT
                )
            )
    return made


def wait_for_step(folder, step, processes, seconds=300):
    """Waits until the step has been logged."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if (folder / "metrics.jsonl").exists():
            text = (folder / "metrics.jsonl").read_text()
            if any(
                json.loads(line)["step"] >= step
                for line in text.splitlines(keepends=True)
                if line.endswith("\n")
            ):
                return
        assert all(p.poll() is None for p in processes), "a process has ended"
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached in {seconds} s")


def finish(folder):
    """Runs to the end, and returns the adapters."""
    for process in start(folder):
        assert process.wait(600) == 0
    return checkpoint.load_adapters(folder / "adapter")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize("victim, step", [(1, 10), (0, 13), (1, 12)])
def test_the_survivor_leaves_and_a_restart_ends_the_same(whole, tmp_path, victim, step):
    """Step 12 is being saved when the process is killed."""
    folder = tmp_path / "run"
    processes = start(folder)
    wait_for_step(folder, step, processes)
    processes[victim].send_signal(signal.SIGKILL)
    began = time.monotonic()
    code = processes[1 - victim].wait(60)
    print(f"survivor of {victim} left after {time.monotonic() - began:.1f} s: {code}")
    assert code != 0
    saved = [
        int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit()
    ]
    assert max(saved) >= step - 6
    jax.tree.map(np.testing.assert_array_equal, finish(folder), whole)
    steps = [x["step"] for x in metric_log.read(folder) if "loss" in x]
    assert steps == [*range(1, FIELDS["run.steps"] + 1)]


@pytest.mark.parametrize("told", [(1,), (0, 1)])
def test_one_that_is_told_to_stop_stops_both_at_one_step(whole, tmp_path, told):
    folder = tmp_path / "run"
    processes = start(folder)
    wait_for_step(folder, 5, processes)
    for number in told:
        os.kill(processes[number].pid, signal.SIGTERM)
        time.sleep(1 if len(told) > 1 else 0)
    codes = [process.wait(120) for process in processes]
    assert codes == [preemption.EXIT_PREEMPTED] * 2
    jax.tree.map(np.testing.assert_array_equal, finish(folder), whole)
