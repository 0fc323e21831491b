"""The table of a sweep's runs, and the processes that fill it.

`runs.jsonl` holds a JSON line a run: "fields" (of the grid), "hash" (of the complete
config), "ok", "results", "seconds" (of the process), "workdir", and of a member of a
population "member" and "population", its number and theirs. A failed run has the end of
its log instead of results, and is tried again. A line of another hash counts for
nothing. One parent writes the file, whole and by rename.
"""

import contextlib
import fcntl
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import logging

from experiments.sweeping import COMMON, Job, Run

Line = dict[str, Any]
TAIL = 15  # lines of a failed run's log
LESS = ("bpb", "loss", "perplexity", "seconds", "_ms", "bytes", "trainable")
"""Words in the name of a metric of which less is better."""


class RunTable:
    """The lines of `folder/runs.jsonl`.

    A last line that was cut off is dropped.

    Args:
      folder: of the sweep.

    Raises:
      ValueError: another line is not one of a run.
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
                        f"{self.path}, line {number} is not a run's; mend or remove it"
                    ) from e
                logging.warning("%s: the last line is cut off; dropped", self.path)
            else:
                self.lines.append(line)

    def add(self, lines: Sequence[Line]) -> None:
        """Appends lines: after it the file has all of them, or none."""
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
        """The last line of the run; one that is finished goes before a failed one."""
        own = [line for line in self.lines if line["hash"] == run.hash]
        return next(reversed([line for line in own if line["ok"]] or own), None)

    def finished(self, run: Run, metric: str = "") -> bool:
        """Whether the run has a line, and in it what is asked of a run of its own."""
        line = self.latest(run)
        if line is None or not line["ok"]:
            return False
        lacks = metric and value_of(line["results"], metric) is None
        return not (lacks and "member" in line and metric not in COMMON)


@contextlib.contextmanager
def only_one(folder: pathlib.Path) -> Iterator[None]:
    """Holds the folder for this process; ValueError if another one has it."""
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


# ------------------------------------------------------------------- the processes


def fill(
    table: RunTable,
    jobs: Sequence[Job],
    at_once: int,
    command: Callable[[Job, pathlib.Path], Sequence[str]],
) -> int:
    """Launches the jobs, writes the lines and returns how many runs failed."""
    failed, left = 0, len(jobs)

    def finished(job: Job, lines: list[Line]) -> None:
        nonlocal failed, left
        table.add(lines)
        left -= 1
        first = lines[0]
        if first["ok"]:
            print(f"{job.name}: done in {first['seconds']:.1f} s, {left} left")
        else:
            failed += len(lines)
            print(
                f"{job.name}: FAILED with exit code {first['exit_code']}, {left} left; "
                f"the end of {first['log']}:\n{first['tail']}"
            )
            if len(job.runs) > 1:
                print("--populations=false runs its members one by one")
        sys.stdout.flush()

    launch(jobs, at_once, command, table.path.parent, finished)
    return failed


def launch(
    jobs: Sequence[Job],
    at_once: int,
    command: Callable[[Job, pathlib.Path], Sequence[str]],
    folder: pathlib.Path,
    finished: Callable[[Job, list[Line]], None],
    grace: float = 30.0,
) -> None:
    """Runs every job in a process, some side by side; a failure stops no other.

    However it is left, SIGTERM and Ctrl-C included, no process stays behind.

    Args:
      jobs: in the order in which they start.
      at_once: how many side by side.
      command: of a job and its folder.
      folder: of the sweep; a job's is `folder/<name>`, with its output in `log.txt`.
      finished: gets each job with its lines, one a run, as soon as it is over.
      grace: seconds that processes have between SIGTERM and SIGKILL; a run that keeps
        itself saves meanwhile.
    """
    environment = dict(os.environ)
    if at_once > 1:  # or the first process takes most of an accelerator's memory
        share = f"{0.9 / at_once:.2f}"
        environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", share)
    waiting = list(reversed(jobs))
    running: dict[subprocess.Popen, tuple[Job, float]] = {}
    try:
        with _terminated_as_exit():
            while waiting or running:
                while waiting and len(running) < at_once:
                    job = waiting.pop()
                    own = folder / job.name
                    own.mkdir(parents=True, exist_ok=True)
                    (own / "results.json").unlink(missing_ok=True)  # of another try
                    with open(own / "log.txt", "wb") as log:
                        process = subprocess.Popen(
                            command(job, own),
                            env=environment,
                            stdin=subprocess.DEVNULL,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            start_new_session=True,  # Ctrl-C comes to us alone
                        )
                    running[process] = job, time.monotonic()
                for process in [p for p in running if p.poll() is not None]:
                    job, began = running.pop(process)
                    seconds = round(time.monotonic() - began, 2)
                    lines = lines_of(job, folder / job.name, process.returncode)
                    finished(job, [line | {"seconds": seconds} for line in lines])
                time.sleep(0.05)
    finally:
        _stop(running, grace)


def lines_of(job: Job, folder: pathlib.Path, code: int) -> list[Line]:
    """The lines of a job that is over, one a run, but for the seconds."""
    results, tail = None, ""
    if code == 0:
        try:
            results = _finite(json.loads((folder / "results.json").read_text()))
        except (OSError, ValueError) as e:
            tail = f"results.json cannot be read: {e}"
    log = folder / "log.txt"
    if results is None:
        text = log.read_text("utf-8", errors="replace").splitlines()
        tail = "\n".join([*text[-TAIL:], *filter(None, [tail])])
    lines = []
    for k, run in enumerate(job.runs):
        line: Line = {"fields": run.fields, "hash": run.hash, "ok": results is not None}
        if results is None:
            line |= {"exit_code": code, "log": str(log), "tail": tail}
        elif len(job.runs) == 1:
            line["results"] = results
        else:  # in the form of a run of its own
            row = results["members"][k]
            own = {name: row[name] for name in ("test_bpb", "trainable", "skipped")}
            line["results"] = {"base": results["base"], "lora": own}
        if len(job.runs) > 1:
            line |= {"member": k, "population": len(job.runs)}
        lines.append(line | {"workdir": str(folder)})
    return lines


@contextlib.contextmanager
def _terminated_as_exit() -> Iterator[None]:
    """SIGTERM leaves the block as an exception would."""

    def leave(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(running: dict[subprocess.Popen, Any], grace: float) -> None:
    """Ends the processes and what they started, at the latest after the grace."""
    alive = lambda: [process for process in running if process.poll() is None]

    def tell(number: int) -> None:
        for process in alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    end = time.monotonic() + grace
    try:
        tell(signal.SIGTERM)
        while alive() and time.monotonic() < end:
            time.sleep(0.05)
    finally:  # after a second Ctrl-C too
        tell(signal.SIGKILL)
        for process in running:
            process.wait()


# ---------------------------------------------------------------------- the report


def value_of(results: Any, name: str) -> Any:
    """The number at a dotted name of the results; None if there is none."""
    for part in name.split("."):
        results = results.get(part) if isinstance(results, dict) else None
    return results if isinstance(results, int | float) else None


def names_of(results: Any, prefix: str = "") -> list[str]:
    """The dotted names of all numbers."""
    names = []
    for name, value in results.items():
        if isinstance(value, dict):
            names += names_of(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) or value is None:
            names.append(prefix + name)
    return names


def default_metric(results: Line, config: Any) -> str:
    """What a run is judged by: of the first method, or what the base is judged by."""
    if "base" in results:
        return f"{config.run.methods[0]}.test_bpb"
    return next((name for name in results if f"base_{name}" in results), "steps")


def report(
    table: RunTable, runs: Sequence[Run], metric: str = "", best: str = "auto"
) -> str:
    """Returns the runs as a Markdown table, best first, failed ones last.

    Args:
      table: with their lines.
      runs: of the grid.
      metric: dotted name in the results; "" for `default_metric`.
      best: "min", "max", or "auto": less is better of names with a word of LESS.

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
    form = lambda row: " | ".join(map(str.ljust, row, widths))
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
        told = "not finite" if value is None else f"{value:.5g}"
    return [told, *values, f"{line['seconds']:.1f}", name]


def _finite(value: Any) -> Any:
    """The same without NaN and infinities, which JSON has not: None."""
    if isinstance(value, dict):
        return {name: _finite(held) for name, held in value.items()}
    if isinstance(value, list):
        return [_finite(held) for held in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
