"""SIGTERM: the run saves where it is, and ends like an uninterrupted one."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading

import pytest

from experiments.machine import preemption
from experiments.machine.preemption import EXIT_DEADLINE, EXIT_PREEMPTED, Preemption
from tests import children

pytestmark = pytest.mark.once

STEPS = 40


def run(folder, stop_at=None, again=False, deadline=(), by=signal.SIGTERM):
    """Starts the run, sends a signal after a step; returns exit code and lines."""
    command = [sys.executable, "-m", "tests.experiments.preempted"]
    command += [str(folder), str(STEPS), *deadline]
    child = subprocess.Popen(
        command,
        cwd=children.ROOT,
        env=children.environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = []
    timer = threading.Timer(300, child.kill)
    timer.start()
    with child:
        for line in child.stdout:
            lines.append(line.strip())
            told = lines[-1] == f"step {stop_at}" or (again and lines[-1] == "saving")
            if told:
                child.send_signal(by)
    timer.cancel()
    return child.returncode, lines


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    code, lines = run(tmp_path_factory.mktemp("whole"))
    assert code == 0 and lines[-1].startswith("end ")
    return lines


def stopped_and_restarted(folder, stop_at, uninterrupted, again):
    code, first = run(folder, stop_at, again)
    assert code == EXIT_PREEMPTED and first[-1] == "saving", first
    reached = int(first[-2].removeprefix("step "))
    assert stop_at <= reached < STEPS
    code, second = run(folder)
    assert code == 0 and second[0] == f"step {reached + 1}"
    assert second[-1] == uninterrupted[-1], "another end"


@pytest.mark.parametrize(
    "again",
    [
        pytest.param(False, id="once"),
        pytest.param(True, id="twice", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_told_to_go_ends_alike(tmp_path, uninterrupted, again):
    stop_at = random.Random(int(again)).randrange(1, STEPS // 2)
    stopped_and_restarted(tmp_path, stop_at, uninterrupted, again)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_ten_times_at_a_random_step(tmp_path, uninterrupted, seed):
    stop_at = random.Random(100 + seed).randrange(1, STEPS // 2)
    stopped_and_restarted(tmp_path, stop_at, uninterrupted, again=seed % 2)


def test_a_run_that_is_killed_ends_alike(tmp_path, uninterrupted):
    """When a save has just begun: it resumes from that one or the one before."""
    code, _ = run(tmp_path, 14, by=signal.SIGKILL)
    assert code == -signal.SIGKILL
    code, lines = run(tmp_path)
    assert code == 0 and lines[0] in ("step 1", "step 8", "step 15")
    assert lines[-1] == uninterrupted[-1], "another end"


def test_a_save_past_its_deadline_is_left(tmp_path, capfd):
    code, lines = run(tmp_path, stop_at=9, deadline=["1.5"])
    assert code == EXIT_DEADLINE and lines[-1] == "saving"
    reached = lines[-2].removeprefix("step ")
    told = f"step {reached} was not saved within 1.5 s; the run will resume from the"
    assert told in capfd.readouterr().err
    assert (tmp_path / "7").is_dir() and not (tmp_path / reached).exists()


def test_the_handler_before_it_comes_back():
    seen = []
    mine = lambda number, frame: seen.append(number)
    outer = signal.signal(signal.SIGTERM, mine)
    try:
        with pytest.raises(RuntimeError, match="lost"):
            with Preemption() as preempted:
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGTERM)
                assert preempted.should_stop(1)
                raise RuntimeError("lost")
        assert not seen and signal.getsignal(signal.SIGTERM) is mine
        signal.raise_signal(signal.SIGTERM)
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, outer)


def test_several_processes_ask_jax(monkeypatch):
    """Then JAX has the signal, and every process asks at every step until it stops."""
    asked = []
    reached = lambda step: bool(asked.append(step)) or step == 3
    monkeypatch.setattr(preemption.jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        preemption.multihost_utils, "reached_preemption_sync_point", reached
    )
    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as preempted:
        assert signal.getsignal(signal.SIGTERM) is before
        assert [preempted.should_stop(step) for step in (1, 2, 3, 4)] == [0, 0, 1, 1]
    assert asked == [1, 2, 3]


def test_a_save_within_its_deadline_leaves_no_watch():
    with Preemption(deadline=60).saving(1):
        (watch,) = [t for t in threading.enumerate() if t.name == "save-deadline"]
    watch.join(10)
    assert not watch.is_alive()
    with Preemption(deadline=None).saving(1):
        assert "save-deadline" not in [t.name for t in threading.enumerate()]


def test_bad_arguments():
    with pytest.raises(ValueError, match="deadline must be positive, or None; got 0"):
        Preemption(deadline=0)
    caught = []

    def enter():
        with pytest.raises(RuntimeError, match="entered in the main thread"):
            Preemption().__enter__()
        caught.append(True)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert caught
