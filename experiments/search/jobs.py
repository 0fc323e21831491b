"""The processes of a sweep: several at a time, none left behind."""

import contextlib
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.machine import disk
from experiments.search import combinations
from experiments.search.combinations import Job, Run
from experiments.search.runs import Line, RunTable, only_one, report

TAIL = 15  # lines of a failed run's log


class Asked(NamedTuple):
    """What is asked of a sweep.

    Attributes:
      config: the config file, as it was typed.
      overrides: fields that the command line sets besides the grid, with their values.
      at_once: processes at a time.
      populations: whether similar runs train as one.
      members: most members of a population.
      metric: dotted name in the results to sort by; "": the task's own.
      best: "min", "max" or "auto".
      dry_run: list the runs, and run none.
    """

    config: str
    overrides: Mapping[str, Any]
    at_once: int = 1
    populations: bool = True
    members: int = 16
    metric: str = ""
    best: str = "auto"
    dry_run: bool = False


def sweep(folder: pathlib.Path, every: Sequence[Run], asked: Asked) -> int:
    """Runs what is not finished yet, prints the table and returns the exit code.

    Raises:
      ValueError: another sweep uses the folder, or no result has the metric.
    """
    with contextlib.ExitStack() as stack:
        if not asked.dry_run:
            stack.enter_context(only_one(folder))
        table = RunTable(folder)
        todo = combinations.make_jobs(
            [run for run in every if not table.finished(run, asked.metric)],
            asked.overrides,
            populations=asked.populations,
            metric=asked.metric,
            most=asked.members,
        )
        print(combinations.describe(every, todo, asked.at_once), flush=True)
        if asked.dry_run:
            return 0
        failed = fill(table, todo, asked.at_once, make_command(asked.config))
        text = report(table, every, asked.metric, asked.best)
        disk.replace(folder / "table.md", text + "\n")
        print(f"\n{text}\n\nWritten to {folder}: runs.jsonl table.md")
        return 1 if failed else 0


def make_command(config: str) -> Callable[[Job, pathlib.Path], list[str]]:
    """Returns `(job, its folder) -> command line` for a config file."""

    def command(job: Job, folder: pathlib.Path) -> list[str]:
        main = [sys.executable, "-m", "lorax_cli", "run", f"--config={config}"]
        return [*main, *job.flags, f"--workdir={folder}"]

    return command


def fill(
    table: RunTable,
    jobs: Sequence[Job],
    at_once: int,
    command: Callable[[Job, pathlib.Path], Sequence[str]],
) -> int:
    """Launches the jobs, adds their lines to the table and counts failed runs."""
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
    """Runs every job in its own process; a failure does not stop the others.

    However this function ends, by SIGTERM or Ctrl-C too, no process is left running.

    Args:
      jobs: in the order in which they start.
      at_once: how many run at a time.
      command: `(job, its folder) -> command line`.
      folder: of the sweep; a job's is `folder/<name>`, with its output in `log.txt`.
      finished: called with each job and its lines, one per run, as soon as it ends.
      grace: seconds between SIGTERM and SIGKILL, in which a run with checkpoints saves.
        A second signal kills the processes at once.

    Raises:
      SystemExit: after a signal, with 128 and its number.
    """
    environment = dict(os.environ)
    if at_once > 1:  # else the first process takes most of an accelerator's memory
        share = f"{0.9 / at_once:.2f}"
        environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", share)
    waiting = list(reversed(jobs))
    running: dict[subprocess.Popen, tuple[Job, float]] = {}

    def start(job: Job) -> None:
        own = folder / job.name
        own.mkdir(parents=True, exist_ok=True)
        (own / "results.json").unlink(missing_ok=True)  # of an earlier try
        with open(own / "log.txt", "wb") as log:
            process = subprocess.Popen(
                command(job, own),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches only us
            )
        running[process] = job, time.monotonic()

    with _signals() as told:
        try:
            while (waiting or running) and not told:
                while waiting and len(running) < at_once:
                    start(waiting.pop())
                for process in [p for p in running if p.poll() is not None]:
                    job, began = running.pop(process)
                    seconds = round(time.monotonic() - began, 2)
                    lines = lines_of(job, folder / job.name, process.returncode)
                    finished(job, [line | {"seconds": seconds} for line in lines])
                time.sleep(0.05)
        finally:
            _stop(running, grace, told)
    if told:
        raise SystemExit(128 + told[0])


def lines_of(job: Job, folder: pathlib.Path, code: int) -> list[Line]:
    """Returns the lines of a finished job, one per run, without the seconds."""
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
        else:  # in the form of a single run
            row = results["members"][k]
            own = {name: row[name] for name in ("test_bpb", "trainable", "skipped")}
            line["results"] = {"base": results["base"], "lora": own}
        if len(job.runs) > 1:
            line |= {"member": k, "population": len(job.runs)}
        lines.append(line | {"workdir": str(folder)})
    return lines


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of raising between any two lines.

    An exception could leave a process that was started but not yet recorded, or half a
    table.
    """
    told: list[int] = []

    def take(number: int, _: Any) -> None:
        told.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, take) for number in numbers}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(
    running: dict[subprocess.Popen, Any], grace: float, told: Sequence[int]
) -> None:
    """Ends the processes; kills them after the grace or at a second signal."""

    def alive() -> list[subprocess.Popen]:
        return [process for process in running if process.poll() is None]

    def tell(number: int) -> None:
        for process in alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)  # and what it started

    end = time.monotonic() + grace
    tell(signal.SIGTERM)
    while alive() and time.monotonic() < end and len(told) < 2:
        time.sleep(0.05)
    tell(signal.SIGKILL)
    for process in running:
        process.wait()


def _finite(value: Any) -> Any:
    """Replaces NaN and infinities, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {name: _finite(held) for name, held in value.items()}
    if isinstance(value, list):
        return [_finite(held) for held in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
