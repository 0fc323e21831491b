"""Metrics on disk: JSON lines, and TensorBoard where tensorboardX is installed."""

import json
import math
import pathlib
import time
from collections.abc import Mapping
from typing import Any, Self

from absl import logging


class Writer:
    """Writes scalars to `metrics.jsonl` and `tensorboard/<run>/`.

    One line holds one call: `{"run": "lora", "step": 10, "time": 1.7, "loss": 2.5}`,
    `time` in seconds since the writer was opened. A value that is not finite becomes
    `null`, for JSON has no NaN.

    Args:
      workdir: folder to write to, made if need be.
      fresh: an earlier run's metrics are replaced; False: they stay, see `rewind`.
    """

    def __init__(self, workdir: str | pathlib.Path, fresh: bool = True) -> None:
        """Opens the files."""
        self._workdir = pathlib.Path(workdir)
        self._workdir.mkdir(parents=True, exist_ok=True)
        self._path, self._from = self._workdir / "metrics.jsonl", 0
        if fresh:
            for stale in self._workdir.glob("tensorboard/*/events.out.tfevents.*"):
                stale.unlink()
        self._lines = open(self._path, "w" if fresh else "a", encoding="utf-8")
        self._boards: dict[str, Any] = {}
        self._start = time.monotonic()
        try:
            import tensorboardX  # imported here: it is an optional extra

            self._tensorboard = tensorboardX
        except ImportError:
            self._tensorboard = None
            logging.warning("tensorboardX is not installed: writing JSON lines only")

    def rewind(self, step: int) -> None:
        """Drops what an earlier run wrote of later steps: they come once more."""
        self._lines.close()
        kept = [line for line in read(self._workdir) if line["step"] <= step]
        with open(self._path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
        self._lines = open(self._path, "a", encoding="utf-8")
        self._from = step + 1

    def write(self, run: str, step: int, values: Mapping[str, Any]) -> None:
        """Appends the scalars `values` of `run` at `step`."""
        values = {name: float(value) for name, value in values.items()}
        seconds = round(time.monotonic() - self._start, 3)
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        line = {"run": run, "step": int(step), "time": seconds, **finite}
        self._lines.write(json.dumps(line, allow_nan=False) + "\n")
        self._lines.flush()
        if self._tensorboard is not None:
            if run not in self._boards:
                folder = str(self._workdir / "tensorboard" / run)
                self._boards[run] = self._tensorboard.SummaryWriter(
                    folder, purge_step=self._from or None
                )
            for name, value in values.items():
                self._boards[run].add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes every file."""
        self._lines.close()
        for board in self._boards.values():
            board.close()

    def __enter__(self) -> Self:
        """Returns the writer itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes the files, whatever happened."""
        self.close()


def read(workdir: str | pathlib.Path) -> list[dict[str, Any]]:
    """Reads back the lines of `workdir/metrics.jsonl`."""
    text = (pathlib.Path(workdir) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
