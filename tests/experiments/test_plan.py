"""The planner's command line; and with libtpu, plans for TPUs that are not there."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from tests import children

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no libtpu (extra 'tpu')"
)


def command(*flags, config="llama3_8b_lora.py:runlocal"):
    path = os.pathsep.join([str(children.ROOT), *sys.path])
    env = children.environment(PYTHONPATH=path)
    asked = [f"--config=configs/{config}", *flags]
    return subprocess.run(
        [sys.executable, "-m", "experiments.plan", *asked],
        cwd=children.ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_plan_in_a_child_with_eight_devices():
    done = command("--config.sharding.tensor=2", "--config.run.steps=7")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("cpu:8: 8 devices\n")
    assert "data=1 fsdp=4 tensor=2, 8 x 32 tokens, remat full" in done.stdout
    assert re.search(r"all-gather +\d+\.\d+ MiB per chip", done.stdout)


def test_an_unknown_topology_is_a_usage_error():
    done = command("--topology=v9z:4x4")
    assert done.returncode == 1
    assert "unknown topology 'v9z:4x4'" in done.stdout + done.stderr


@needs_libtpu
@pytest.mark.slow
def test_a_small_plan_for_a_tpu():
    done = command("--topology=v5litepod-4")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "v5e:2x2 (v5litepod-4): 4 chips" in done.stdout
    assert "fits" in done.stdout and "15.750 GiB per chip" in done.stdout
    assert done.stdout.count("XLA estimate, not measured") == 1
    assert re.search(
        r"step, all at once +\S+ s \(estimate, not measured\)", done.stdout
    )


@needs_libtpu
@pytest.mark.slow
def test_what_the_compiler_has_no_memory_for_does_not_fit():
    full = "--config.data.batch_size=64"
    done = command(full, config="llama3_8b_lora.py")
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"verdict +does not fit", done.stdout)
    assert "exceeds available HBM (15.75G)" in done.stdout


@needs_libtpu
@pytest.mark.slow
def test_a_slice_that_libtpu_does_not_know():
    done = command("--topology=v5e:3x5")
    assert done.returncode == 1
    assert "unknown topology 'v5e:3x5'; libtpu says" in done.stdout + done.stderr
