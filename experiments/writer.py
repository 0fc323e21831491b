"""Metrics on disk: JSON lines, and TensorBoard where tensorboardX is installed."""

import json
import math
import pathlib
import time
from collections.abc import Mapping
from typing import Any, Self

from absl import logging


class Writer:
    """Writes scalars to `metrics.jsonl` and `tensorboard/<run>/`, afresh every time.

    One line holds one call: `{"run": "lora", "step": 10, "time": 1.7, "loss": 2.5}`,
    `time` in seconds since the writer was opened. A value that is not finite becomes
    `null`, for JSON has no NaN.

    Args:
      workdir: folder to write to, made if need be; an earlier run's metrics are
        replaced.
    """

    def __init__(self, workdir: str | pathlib.Path) -> None:
        """Opens the files."""
        self._workdir = pathlib.Path(workdir)
        self._workdir.mkdir(parents=True, exist_ok=True)
        for stale in self._workdir.glob("tensorboard/*/events.out.tfevents.*"):
            stale.unlink()
        self._lines = open(self._workdir / "metrics.jsonl", "w", encoding="utf-8")
        self._boards: dict[str, Any] = {}
        self._start = time.monotonic()
        try:
            import tensorboardX  # imported here: it is an optional extra

            self._tensorboard = tensorboardX
        except ImportError:
            self._tensorboard = None
            logging.warning("tensorboardX is not installed: writing JSON lines only")

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
                self._boards[run] = self._tensorboard.SummaryWriter(folder)
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
