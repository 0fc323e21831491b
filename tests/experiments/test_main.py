"""The command line refuses fields that the config does not have."""

import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.once

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


CONFIG = "--config=configs/quickstart.py"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([CONFIG, "--config.adapter.rnak=4"], 'Did you mean "rank" instead of "rnak"'),
        ([CONFIG, "--config.adapter.rank=four"], "--config.adapter.rank=four"),
        (
            [CONFIG, "--config.run.log_every=0"],
            "log_every=0; it must be an int",
        ),
        ([CONFIG, "--config.adapter.init=pisa"], "init='pisa'; choose one of"),
        ([f"{CONFIG}:runlocl"], "'runlocl' is not an argument of this config"),
        (["--config=configs/quickstrt.py"], "lorax's configs: configs/quickstart.py"),
        (["--config=quikstart"], "Give a file, or the name of one of lorax's configs"),
    ],
)
def test_what_is_mistyped_is_one_sentence_at_once(flags, told):
    done = launch(*flags)
    assert done.returncode == 1
    assert told in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.startswith("experiments.main: ") and done.stdout == ""


def test_a_workdir_that_is_a_link_to_nothing_is_named_at_once(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "gone")
    done = launch(CONFIG, f"--workdir={tmp_path}/run")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    told = f"/run is a symbolic link to {tmp_path}/gone, which does not exist: create"
    assert told in done.stderr


def test_config_is_required():
    done = launch()
    assert done.returncode != 0 and "--config" in done.stderr
