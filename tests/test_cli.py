"""The command `lorax` runs its programs from anywhere, with clear messages."""

import os
import pathlib
import subprocess
import sys

import pytest

import lorax_cli
from experiments.reading import command
from lorax_cli import __main__ as cli

pytestmark = pytest.mark.once

SCREEN = 40  # lines


def launch(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "lorax_cli", *arguments],
        cwd=cwd,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(lorax_cli.ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def theirs(tmp_path):
    """A working directory with its own, broken `experiments` package."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "__init__.py").write_text("1 / 0\n")
    return tmp_path


@pytest.mark.parametrize("name", lorax_cli.COMMANDS)
def test_help_is_one_screen_and_does_not_load_jax(name, theirs):
    told = launch(name, "--help", cwd=theirs)
    assert "Traceback" not in told.stderr
    assert 3 < len(told.stdout.splitlines()) <= SCREEN
    assert f"lorax {name}" in told.stdout


def test_usage_has_every_command_and_config():
    text = cli.usage()
    assert len(text.splitlines()) <= SCREEN
    for name in (*lorax_cli.COMMANDS, *lorax_cli.configs()):
        assert name in text
    programs = {path.stem for path in (lorax_cli.ROOT / "experiments").glob("*.py")}
    modules = {lorax_cli.module(name).split(".")[1] for name in lorax_cli.COMMANDS}
    assert programs - modules == {"__init__", "launch_local", "paired"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["rum"], "lorax: rum is not a command; did you mean run?"),
        (["run"], "lorax run: give --config, see lorax run --help"),
        (["tune", "--config=quickstart", "--runs=x"], "lorax tune: flag --runs=x"),
        (["describe", "stories26k"], "lorax describe: "),
    ],
)
def test_a_mistake_is_one_sentence(arguments, told, theirs):
    done = launch(*arguments, cwd=theirs)
    assert done.returncode and done.stderr.startswith(told), done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_config_is_a_file_or_one_of_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = str(lorax_cli.CONFIGS / "quickstart.py")
    assert command.find_config("quickstart") == ours
    assert command.find_config("quickstart:runlocal") == f"{ours}:runlocal"
    assert command.find_config("configs/quickstart.py:runlocal") == f"{ours}:runlocal"
    pathlib.Path("quickstart").write_text("")  # a file of that name takes precedence
    assert command.find_config("quickstart:a") == "quickstart:a"
    assert command.find_config("nothing:a") == "nothing:a"


def test_a_plugin_of_the_working_directory_is_found(theirs):
    (theirs / "mine.py").write_text("raise SystemExit('mine was loaded')\n")
    flags = ["--config=quickstart:runlocal", "--config.run.plugins=('mine',)"]
    assert "mine was loaded" in launch("run", *flags, cwd=theirs).stderr
