"""Metrics: JSON lines, TensorBoard if tensorboardX is installed, W&B if asked for.

Both files are written before `write` returns, so that a failing disk ends the run at
once. tensorboardX's own `SummaryWriter` writes in a thread: the first error kills the
thread, and the run then waits forever for room in its queue.
"""

import contextlib
import json
import math
import pathlib
import secrets
import socket
import time
from collections.abc import Mapping
from typing import Any, Self

from absl import logging

from experiments.machine import disk, record
from lorax.checkpoint import folders

SYNC_SECONDS = 30
"""Seconds between two flushes of TensorBoard's file to disk."""


class Writer:
    """Writes scalars to `metrics.jsonl` and `tensorboard/<run>/`.

    Each call writes one line: `{"run": "lora", "step": 10, "time": 1.7, "loss": 2.5}`,
    with `time` in seconds since the writer was opened. A value that is not finite
    becomes `null`, because JSON has no NaN.

    Args:
      workdir: folder to write to, created if missing.
      fresh: replaces an earlier run's metrics; False keeps them, see `rewind`.
      project: a Weights & Biases project that gets everything too; "" for none.

    Raises:
      ValueError: the workdir is a file or a broken link, or a project is given and
        wandb is not installed.
      OSError: writing failed; names the path, here and in every method.
    """

    def __init__(
        self, workdir: str | pathlib.Path, fresh: bool = True, project: str = ""
    ) -> None:
        """Opens the files."""
        self._workdir = pathlib.Path(workdir)
        folders.require_directory(self._workdir)
        self._path, self._from = self._workdir / "metrics.jsonl", 0
        with disk.failing(self._path):
            self._workdir.mkdir(parents=True, exist_ok=True)
            if fresh:
                for stale in self._workdir.glob("tensorboard/*/events.out.tfevents.*"):
                    stale.unlink()
            self._lines = open(self._path, "w" if fresh else "a", encoding="utf-8")
        self._boards: dict[str, _Board] = {}
        self._start = time.monotonic()
        self._wandb = _Wandb(self._workdir, project, fresh) if project else None
        try:
            import tensorboardX  # imported here: it is an optional extra

            self._tensorboard = tensorboardX
        except ImportError:
            self._tensorboard = None
            logging.warning("tensorboardX is not installed: writing JSON lines only")

    def rewind(self, step: int) -> None:
        """Drops an earlier run's lines after `step`: those steps are made again."""
        self._lines.close()
        kept = [line for line in read(self._workdir) if line["step"] <= step]
        disk.replace(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        with disk.failing(self._path):
            self._lines = open(self._path, "a", encoding="utf-8")
        self._from = step + 1

    def write(self, run: str, step: int, values: Mapping[str, Any]) -> None:
        """Appends the scalars `values` of `run` at `step`."""
        values = {name: float(value) for name, value in values.items()}
        seconds = round(time.monotonic() - self._start, 3)
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        line = {"run": run, "step": int(step), "time": seconds, **finite}
        with disk.failing(self._path):
            self._lines.write(json.dumps(line, allow_nan=False) + "\n")
            self._lines.flush()
        if self._tensorboard is not None:
            if run not in self._boards:
                folder = self._workdir / "tensorboard" / run
                self._boards[run] = _Board(self._tensorboard, folder, self._from)
            self._boards[run].write(step, values)
        if self._wandb is not None:
            self._wandb.write(run, step, values)

    def close(self) -> None:
        """Flushes and closes every file."""
        with contextlib.ExitStack() as files:  # all of them, even if one fails
            for board in self._boards.values():
                files.callback(board.close)
            if self._wandb is not None:
                files.callback(self._wandb.close)
            with disk.failing(self._path):
                self._lines.close()

    def __enter__(self) -> Self:
        """Returns the writer itself."""
        return self

    def __exit__(self, error: object, *_: object) -> None:
        """Closes the files in any case; an error from before takes precedence."""
        with contextlib.suppress(OSError) if error else contextlib.nullcontext():
            self.close()


class _Board:
    """One event file of TensorBoard, written in the calling thread.

    Args:
      tensorboard: the module tensorboardX.
      folder: of the file.
      start: the first step; TensorBoard hides what older files hold from there on. 0
        hides nothing.
    """

    def __init__(self, tensorboard: Any, folder: pathlib.Path, start: int) -> None:
        self._event = tensorboard.proto.event_pb2
        self._summary = tensorboard.proto.summary_pb2.Summary
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        self._path, self._synced = folder / name, time.monotonic()
        with disk.failing(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tensorboard.RecordWriter(str(self._path))
            self._add(file_version="brain.Event:2")
            if start:
                log = self._event.SessionLog
                self._add(step=start, session_log=log(status=log.SessionStatus.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends scalars."""
        one = self._summary.Value
        scalars = [one(tag=name, simple_value=value) for name, value in values.items()]
        with disk.failing(self._path):
            self._add(step=int(step), summary=self._summary(value=scalars))
            if time.monotonic() - self._synced > SYNC_SECONDS:
                self._file.flush()
                self._synced = time.monotonic()

    def _add(self, **fields: Any) -> None:
        event = self._event.Event(wall_time=time.time(), **fields)
        self._file.write(event.SerializeToString())

    def close(self) -> None:
        """Flushes the file to disk and closes it."""
        with disk.failing(self._path), contextlib.closing(self._file):
            self._file.flush()


class _Wandb:
    """A Weights & Biases run, named after the folder; a resumed run continues it.

    Steps are metrics of their own, "lora/step": W&B's own step must not decrease, and
    it would where "full" follows "lora".
    """

    def __init__(self, workdir: pathlib.Path, project: str, fresh: bool) -> None:
        try:
            import wandb  # imported here: nothing else needs it
        except ImportError as error:
            raise ValueError(
                f"config.run.wandb={project!r}: the package wandb is not installed; "
                "pip install wandb, or give ''"
            ) from error
        told = workdir / record.FILE
        known = workdir / "wandb_id"
        if fresh or not known.exists():
            disk.replace(known, secrets.token_hex(8))
        self._run = wandb.init(
            project=project,
            name=workdir.name,
            id=known.read_text(),
            resume="allow",
            dir=str(workdir),
            config=json.loads(told.read_text())["config"] if told.exists() else None,
        )
        self._known: set[str] = set()

    def write(self, run: str, step: int, values: Mapping[str, float]) -> None:
        """Sends scalars."""
        if run not in self._known:
            self._run.define_metric(f"{run}/*", step_metric=f"{run}/step")
            self._known.add(run)
        scalars = {f"{run}/{name}": value for name, value in values.items()}
        self._run.log({**scalars, f"{run}/step": int(step)})

    def close(self) -> None:
        """Waits until everything is sent."""
        self._run.finish()


def read(workdir: str | pathlib.Path) -> list[dict[str, Any]]:
    """Reads back the lines of `workdir/metrics.jsonl`; see `disk.read_lines`."""
    return disk.read_lines(pathlib.Path(workdir) / "metrics.jsonl")
