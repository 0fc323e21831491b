"""A full or read-only disk: the run ends soon, says where, and can resume."""

import errno
import json
import os
import pathlib
import resource
import subprocess
import sys
import time

import pytest

from experiments.machine import disk
from experiments.studies.method import comparison
from experiments.trainer import metric_log

pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 60  # that a process may take to end after its failed write


@pytest.fixture
def size_limit():
    """Limits files to this many bytes; writing more raises an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    yield limit
    limit(soft)


def test_a_full_disk_stops_the_lines(tmp_path, size_limit):
    writer = metric_log.Writer(tmp_path)
    writer.write("lora", 1, {"loss": 2.0})
    size_limit((tmp_path / "metrics.jsonl").stat().st_size + 20)
    told = r"metrics.jsonl could not be written: File too large. Make room there"
    with pytest.raises(OSError, match=told) as caught, writer:
        writer.write("lora", 2, {"loss": 2.0})
    assert caught.value.errno == errno.EFBIG
    assert json.loads((tmp_path / "metrics.jsonl").read_text().split("\n")[0])


def test_a_full_disk_stops_the_board(tmp_path, size_limit):
    """Within a few calls, as the file is buffered. The old writer waited for ever."""
    pytest.importorskip("tensorboardX")
    (tmp_path / "metrics.jsonl").symlink_to(os.devnull)  # never full
    writer = metric_log.Writer(tmp_path)
    size_limit(4_000)
    values = {f"value_{i}": 1.0 for i in range(90)}
    began = time.monotonic()
    told = r"tensorboard/run_.*/events.out.tfevents.* could not be written: File too"
    with pytest.raises(OSError, match=told), writer:
        for step in range(99):
            writer.write(f"run_{step // 50}", step, values)
    assert time.monotonic() - began < SECONDS


def test_what_the_board_has_tensorboard_reads(tmp_path):
    """Scalars by tag and step, as length-prefixed protocol buffers with checksums."""
    x = pytest.importorskip("tensorboardX")
    with metric_log.Writer(tmp_path) as writer:
        writer.write("lora", 1, {"loss": 2.5, "skipped": 0})
    with metric_log.Writer(tmp_path, fresh=False) as writer:
        writer.rewind(1)
        writer.write("lora", 2, {"loss": 1.5})

    def events(path):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            body, data = data[12 : 12 + length], data[16 + length :]
            yield x.proto.event_pb2.Event.FromString(body)

    old, new = map(list, map(events, sorted(tmp_path.glob("tensorboard/lora/*"))))
    assert old[0].file_version == new[0].file_version == "brain.Event:2"
    scalars = [
        (event.step, value.tag, value.simple_value)
        for event in old + new
        for value in event.summary.value
    ]
    assert scalars == [(1, "loss", 2.5), (1, "skipped", 0.0), (2, "loss", 1.5)]
    # Older files have nothing to show from step 2 on.
    assert (new[1].step, new[1].session_log.status) == (2, 1)


TORN = b'{"run": "lora", "step": 3, "lo'


@pytest.mark.parametrize("torn", [TORN, b"\x00" * 40, b'{"step": 3, "n": "\xc3'])
def test_a_torn_line_is_dropped_and_told(tmp_path, torn, caplog):
    with metric_log.Writer(tmp_path) as writer:
        for step in (1, 2):
            writer.write("lora", step, {"loss": 1.0})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(torn)
    with caplog.at_level("WARNING"), metric_log.Writer(tmp_path, fresh=False) as writer:
        writer.rewind(2)
        writer.write("lora", 3, {"loss": 0.5})
    assert "metrics.jsonl:3: dropped b" in caplog.text
    assert [line["step"] for line in metric_log.read(tmp_path)] == [1, 2, 3]
    text = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in text.splitlines()] == [1, 2, 3]


def test_a_study_goes_on_behind_a_torn_line(tmp_path):
    path = tmp_path / "runs.jsonl"
    comparison.Runs(path, {"a": "x"}).get(("a", 1), lambda: [2.0])
    with open(path, "ab") as file:
        file.write(b'{"key": ["a", 2], "sett')
    runs = comparison.Runs(path, {"a": "x"})
    assert runs.get(("a", 1)) == [2.0]
    assert runs.get(("a", 2), lambda: [1.0]) == [1.0]
    again = comparison.Runs(path, {"a": "x"})
    assert [again.get(("a", i)) for i in (1, 2)] == [[2.0], [1.0]]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, size_limit):
    path = tmp_path / "results.json"
    disk.replace(path, "old")
    size_limit(100)
    with pytest.raises(OSError, match=r"results.json could not be written: File too"):
        disk.replace(path, "new" * 100)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["results.json"]
    with pytest.raises(FileNotFoundError, match="gone/x could not be written: No such"):
        disk.replace(tmp_path / "gone" / "x", "")


def test_rewinding_on_a_full_disk_loses_nothing(tmp_path, size_limit):
    with metric_log.Writer(tmp_path) as writer:
        for step in range(9):
            writer.write("lora", step, {"loss": 1.0})
    writer = metric_log.Writer(tmp_path, fresh=False)
    size_limit(100)
    with pytest.raises(OSError, match="metrics.jsonl could not be written"):
        writer.rewind(5)
    assert [line["step"] for line in metric_log.read(tmp_path)] == list(range(9))


CHILD = """
import errno, os, sys, time
import jax.numpy as jnp, optax, jax
from lorax import checkpoint, training
from lorax.adapters import Full

def no(*args, **kwargs):
    raise OSError(errno.EROFS, "Read-only file system", str(args[0]))

state = training.create_state(
    jax.random.key(0), {"w": Full(jnp.ones(9))}, optax.adam(0.1)
)
with checkpoint.RunCheckpoints(sys.argv[1]) as run:
    run.save(state)
    run.wait()
    os.mkdir = no
    print(time.time(), flush=True)
    run.save(state.replace(step=state.step + 1))
    run.wait()
"""


def test_a_disk_that_turns_read_only_ends_the_process(tmp_path):
    """Orbax threads waiting for a directory used to keep it alive for 150 s or more."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "run")],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=140,
    )
    took = time.time() - float(done.stdout)
    assert done.returncode == 1 and took < SECONDS
    told = rf"step 1 could not be written to {tmp_path}/run: [Errno 30] Read-only"
    assert told in done.stderr and "[0], are intact" in done.stderr
