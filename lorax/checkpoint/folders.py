"""What the folder of a run may hold, and which of its steps are kept."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from etils import epath

STATE, RUN = "state", "run"
ORBAX_FILES = {"_CHECKPOINT_METADATA", "commit_success.txt"}
TEMPORARY, ASIDE = ".orbax-checkpoint-tmp", "damaged-"


def require_directory(folder: pathlib.PurePath) -> None:
    """Raises ValueError if the path is not a directory and cannot become one.

    For a broken symbolic link `mkdir` only says "file exists", and orbax only that it
    could not write.

    Example:
      >>> require_directory(pathlib.Path("runs/new"))
    """
    text = os.fspath(folder)
    if "://" in text:
        return
    for path in (text, *map(os.fspath, pathlib.Path(text).parents)):
        within = "" if path == text else f"{text} is inside {path}: "
        if os.path.islink(path) and not os.path.exists(path):
            raise ValueError(
                f"{within}{path} is a symbolic link to {os.readlink(path)}, which does "
                "not exist: create that directory, or remove the link"
            )
        if os.path.exists(path):
            if not os.path.isdir(path):
                raise ValueError(
                    f"{within}{path} is a file; give a directory, or a path where one "
                    "can be created"
                )
            return


def require_ours(folder: epath.Path) -> None:
    """Raises ValueError if the folder holds anything other than steps of a run."""
    require_directory(folder)
    if not folder.exists():
        return
    for path in folder.iterdir():
        if TEMPORARY in path.name or path.name.startswith(ASIDE):
            continue
        inside = {p.name for p in path.iterdir()} if path.is_dir() else set()
        # A half-deleted step may have lost its items, but then holds nothing else.
        whole = not inside or inside & {STATE, RUN} or inside <= ORBAX_FILES
        if not (path.name.isdecimal() and path.is_dir() and whole):
            raise ValueError(
                f"{folder} holds {path.name}, which is not a step of a lorax run: give "
                "checkpoints a directory of their own"
            )


def steps_in(folder: epath.Path) -> list[int]:
    """Returns the complete steps in the folder, damaged ones included, in order."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal())


class KeepLastAndBest:
    """A preservation policy for orbax that uses the metrics in our own record.

    Orbax's own metrics file has no digest, and if damaged it stops orbax's manager.

    Args:
      keep: how many of the newest steps to keep.
      best: a metric; the best step by it is kept too. None for none.
      mode: whether the smallest or the largest value is best.
    """

    def __init__(self, keep: int, best: str | None, mode: str) -> None:
        """Starts with no metrics known."""
        if type(keep) is not int or keep < 1:
            raise ValueError(f"keep must be an int of at least 1; got {keep!r}")
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max'; got {mode!r}")
        self.keep, self.best, self.sign = keep, best, 1 if mode == "max" else -1
        self.metrics: dict[int, dict[str, float | None]] = {}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list:
        """Returns, for each step, whether to keep it."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        values = {s: self.metrics.get(s, {}).get(self.best or "") for s in steps}
        known = {s: self.sign * v for s, v in values.items() if v is not None}
        kept = set(steps[-self.keep :])
        kept |= {max(known, key=known.__getitem__)} if known else set()
        return [step in kept for step in steps]
