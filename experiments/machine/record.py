"""Records what a run was: config, command, versions, and the commit of the code."""

import datetime
import json
import pathlib
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata

import ml_collections

import lorax_cli
from experiments.machine import disk

FILE = "run.json"
PACKAGES = ("lorax-flax", "jax", "jaxlib", "flax", "optax", "numpy")


def program() -> str:
    """Returns the program as typed: `lorax run`, or `python -m experiments.main`."""
    main = sys.modules["__main__"]
    if hasattr(main, "COMMAND"):  # set by `lorax_cli`
        return main.COMMAND
    spec = getattr(main, "__spec__", None)
    return f"python -m {spec.name}" if spec else pathlib.Path(sys.argv[0]).stem


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return found


def commit(folder: pathlib.Path) -> str | None:
    """Returns the commit of a checkout, with a "+" if tracked files have changed since.

    None outside a repository, or without git.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write(folder: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Writes `run.json` into the folder of a run, which is created if missing.

    Args:
      folder: of the run.
      config: of the run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    told = {
        "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([program(), *sys.argv[1:]]),
        "versions": versions(PACKAGES),
        "commit": {
            "lorax": commit(lorax_cli.ROOT),
            "working directory": commit(pathlib.Path.cwd()),
        },
        "config": json.loads(config.to_json_best_effort()),
    }
    disk.replace(folder / FILE, json.dumps(told, indent=2) + "\n")
