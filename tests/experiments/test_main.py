"""The command line refuses what the config does not know."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def launch(*flags):
    return subprocess.run(
        [sys.executable, "-m", "experiments.main", *flags],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--config.adapter.rnak=4", 'Did you mean "rank" instead of "rnak"'),
        ("--config.adapter.rank=four", "--config.adapter.rank=four"),
    ],
)
def test_mistyped_override_fails_at_once(flag, told):
    done = launch("--config=configs/quickstart.py", flag)
    assert done.returncode != 0
    assert told in done.stderr


def test_config_is_required():
    done = launch()
    assert done.returncode != 0 and "--config" in done.stderr
