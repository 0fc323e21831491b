"""The table of a sweep's runs.

`runs.jsonl` holds a JSON line for each run: "fields" (of the grid), "hash" (of the
complete config), "ok", "results", "seconds" (of the process), "workdir" and, for a
member of a population, "member" and "population" (its index and their number). A failed
run has the end of its log instead of results, and is retried. Lines with a hash that is
not in the grid are ignored. Only the parent process writes the file, whole and by
rename.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from absl import logging

from experiments.search.combinations import COMMON, Run

Line = dict[str, Any]
LESS = ("bpb", "loss", "perplexity", "seconds", "_ms", "bytes", "trainable")
"""Words in the names of metrics for which less is better."""


class RunTable:
    """The lines of `folder/runs.jsonl`.

    If the last line is cut off, it is dropped.

    Args:
      folder: of the sweep.

    Raises:
      ValueError: any other line is not a run's.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        """Reads what is there."""
        self.path = folder / "runs.jsonl"
        text = self.path.read_text("utf-8") if self.path.exists() else ""
        self.lines: list[Line] = []
        given = text.splitlines()
        for number, row in enumerate(given, 1):
            try:
                line = json.loads(row)
                line["hash"], line["ok"], line["fields"], line["workdir"]
            except (ValueError, KeyError, TypeError) as e:
                if number < len(given):
                    raise ValueError(
                        f"{self.path}, line {number} is not a run's; fix or remove it"
                    ) from e
                logging.warning("%s: the last line is cut off; dropped", self.path)
            else:
                self.lines.append(line)

    def add(self, lines: Sequence[Line]) -> None:
        """Appends lines atomically: the file gets all of them, or none."""
        self.lines += lines
        handle, partial = tempfile.mkstemp(dir=self.path.parent, suffix=".partial")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                for line in self.lines:
                    file.write(json.dumps(line, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.path)
        except BaseException:
            pathlib.Path(partial).unlink(missing_ok=True)
            raise

    def latest(self, run: Run) -> Line | None:
        """Returns the run's last line; finished ones take precedence over failed."""
        own = [line for line in self.lines if line["hash"] == run.hash]
        return next(reversed([line for line in own if line["ok"]] or own), None)

    def finished(self, run: Run, metric: str = "") -> bool:
        """Whether the run is finished, with the metric if a single run reports it."""
        line = self.latest(run)
        if line is None or not line["ok"]:
            return False
        lacks = metric and value_of(line["results"], metric) is None
        return not (lacks and "member" in line and metric not in COMMON)


@contextlib.contextmanager
def only_one(folder: pathlib.Path) -> Iterator[None]:
    """Locks the folder for this process; ValueError if another one holds it."""
    from lorax.checkpoint import folders  # jax loads only once the grid is right

    folders.require_directory(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder}: another sweep is writing there; wait for it, or give "
                "another --workdir"
            ) from None
        yield


def value_of(results: Any, name: str) -> Any:
    """Returns the number at a dotted name of the results; None if there is none."""
    for part in name.split("."):
        results = results.get(part) if isinstance(results, dict) else None
    return results if isinstance(results, int | float) else None


def names_of(results: Any, prefix: str = "") -> list[str]:
    """Returns the dotted names of all numbers."""
    names = []
    for name, value in results.items():
        if isinstance(value, dict):
            names += names_of(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) or value is None:
            names.append(prefix + name)
    return names


def default_metric(results: Line, config: Any) -> str:
    """Returns the metric to sort by: the first method's, or one of the base's."""
    if "base" in results:
        return f"{config.run.methods[0]}.test_bpb"
    return next((name for name in results if f"base_{name}" in results), "steps")


def report(
    table: RunTable, runs: Sequence[Run], metric: str = "", best: str = "auto"
) -> str:
    """Returns the runs as a Markdown table, best first, failed ones last.

    Args:
      table: holds their lines.
      runs: the runs of the grid.
      metric: dotted name in the results; "" for `default_metric`.
      best: "min", "max", or "auto": "min" for names that contain a word of LESS.

    Raises:
      ValueError: no finished run has the metric.
    """
    lines = [(run, table.latest(run)) for run in runs]
    done = [(run, line) for run, line in lines if line and line["ok"]]
    if done and not metric:
        metric = default_metric(done[0][1]["results"], done[0][0].config)
    known = dict.fromkeys(n for _, line in done for n in names_of(line["results"]))
    if done and metric not in known:
        raise ValueError(
            f"--metric: no result is called {metric!r}; there are {', '.join(known)}"
        )
    less = any(word in metric for word in LESS) if best == "auto" else best == "min"

    def place(row: tuple[Run, Line | None]) -> tuple[int, float]:
        run, line = row
        if not line or not line["ok"]:
            return (2 if line else 3), 0.0
        value = value_of(line["results"], metric)
        return (1, 0.0) if value is None else (0, value if less else -value)

    header = [metric or "result", *runs[0].fields, "seconds", "run"]
    rows = [_cells(run, line, metric) for run, line in sorted(lines, key=place)]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    dashes = [["-" * width for width in widths]]

    def form(row: Sequence[str]) -> str:
        return " | ".join(map(str.ljust, row, widths))

    return "\n".join(f"| {form(row)} |" for row in [header, *dashes, *rows])


def _cells(run: Run, line: Line | None, metric: str) -> list[str]:
    values = [str(value).replace("|", "\\|") for value in run.fields.values()]
    if line is None:
        return ["not run", *values, "", ""]
    name = pathlib.Path(line["workdir"]).name
    name += f" #{line['member']} of {line['population']}" if "member" in line else ""
    told = "failed"
    if line["ok"]:
        value = value_of(line["results"], metric)
        lacks = "not finite" if metric in names_of(line["results"]) else "none"
        told = lacks if value is None else f"{value:.5g}"
    return [told, *values, f"{line['seconds']:.1f}", name]
