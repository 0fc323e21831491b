"""Sweeps: the table of runs, the processes, and one sweep for real."""

import copy
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from configs import gpt2_e2e_lora
from experiments.recipes import byte_model
from experiments.search import combinations, jobs, runs
from tests import children
from tests.experiments.sweep_cases import RATE, config_of, runs_of

# The table


def line_of(run, value=1.0, ok=True, **more):
    results = (
        {"results": {"base": {}, "lora": {"test_bpb": value}}} if ok else {"tail": "x"}
    )
    own = {"fields": run.fields, "hash": run.hash, "ok": ok, "seconds": 1.5}
    return own | {"workdir": f"runs/{run.hash}"} | results | more


def test_the_table_resumes_and_tolerates_a_cut_off_line(tmp_path):
    first, second = runs_of("adapter.rank=2,4")
    table = runs.RunTable(tmp_path)
    assert not table.finished(first)
    table.add([line_of(first), line_of(second, ok=False)])
    whole = table.path.read_text()
    table.path.write_text(whole + json.dumps(line_of(second))[:-9])
    again = runs.RunTable(tmp_path)
    assert again.finished(first) and not again.finished(second)
    again.add([line_of(second, 0.5)])
    assert table.path.read_text().startswith(whole)
    assert len(table.path.read_text().splitlines()) == 3
    again.add([line_of(second, ok=False)])  # finished runs stay finished
    assert runs.RunTable(tmp_path).finished(second)
    # the same fields of another config are another run
    (other,) = runs_of("adapter.rank=2", config_of(run__steps=3))
    assert other.fields == first.fields and not again.finished(other)
    assert sorted(os.listdir(tmp_path)) == ["runs.jsonl"]


def test_a_bad_line_before_the_last_is_an_error(tmp_path):
    (run,) = runs_of("adapter.rank=2")
    text = '{"hash": 1}\n' + json.dumps(line_of(run)) + "\n"
    (tmp_path / "runs.jsonl").write_text(text)
    with pytest.raises(ValueError, match="line 1 is not a run's; fix or remove it"):
        runs.RunTable(tmp_path)


def test_a_member_counts_for_what_a_population_reports(tmp_path):
    (run,) = runs_of("adapter.rank=2")
    table = runs.RunTable(tmp_path)
    table.add([line_of(run, member=0, population=2)])
    assert table.finished(run) and table.finished(run, "lora.test_bpb")
    assert not table.finished(run, "full.test_bpb")
    table.add([line_of(run)])  # a separate run is finished whatever it reports
    assert table.finished(run, "full.test_bpb")


def test_two_sweeps_do_not_share_a_folder(tmp_path):
    with runs.only_one(tmp_path):
        with pytest.raises(ValueError, match="another sweep is writing there; wait"):
            with runs.only_one(tmp_path):
                pass
    with runs.only_one(tmp_path):
        pass


def test_the_report_is_sorted_failures_last(tmp_path):
    made = runs_of("adapter.rank=1,2,3,4,5; run.name=a|b")
    table = runs.RunTable(tmp_path)
    table.add([line_of(made[0], ok=False), line_of(made[1], None), line_of(made[2], 2)])
    table.add([line_of(made[3], 0.123456789, member=1, population=2)])
    rows = [
        [cell.strip() for cell in row.strip("|").split(" | ")]
        for row in runs.report(table, made).splitlines()
    ]
    assert rows[0] == ["lora.test_bpb", "adapter.rank", "run.name", "seconds", "run"]
    named = f"{made[3].hash} #1 of 2"
    assert rows[2] == ["0.12346", "4", "a\\|b", "1.5", named]
    assert [row[0] for row in rows[3:]] == ["2", "not finite", "failed", "not run"]
    other = line_of(made[4]) | {"results": {"base": {}, "full": {"test_bpb": 1.0}}}
    table.add([other])
    rows = runs.report(table, made, "lora.test_bpb").splitlines()
    assert [row.split()[1] for row in rows[4:]] == ["not", "none", "failed"]
    most = runs.report(table, made, "lora.test_bpb", "max").splitlines()
    assert [row.split()[1] for row in most[2:4]] == ["2", "0.12346"]
    with pytest.raises(
        ValueError, match="no result is called 'bleu'; there are lora.t"
    ):
        runs.report(table, made, "bleu")


def test_the_metric_of_a_checkpoints_run_is_that_of_its_task(tmp_path):
    config = gpt2_e2e_lora.get_config("runlocal")
    made = runs_of("adapter.rank=2,4", config)
    table = runs.RunTable(tmp_path)
    for run, value in zip(made, (0.5, 0.75)):
        results = {"steps": 1, "base_valid_accuracy": 0.1, "valid_accuracy": value}
        table.add([line_of(run) | {"results": results}])
    rows = runs.report(table, made).splitlines()
    assert rows[0].split()[1] == "valid_accuracy"
    assert [row.split()[1] for row in rows[2:]] == ["0.75", "0.5"]  # more is better


# The processes, with a stand-in for experiments.main

STAND_IN = """
import json, pathlib, sys
folder, ranks, flags = pathlib.Path(sys.argv[1]), sys.argv[2].split(), sys.argv[3:]
print("flags", flags)
if (folder / "fail").exists():
    print("what went wrong"); sys.exit(3)
rows = [{"test_bpb": float(r), "trainable": 1, "skipped": 0, "rank": r} for r in ranks]
results = {"base": {"test_bpb": float("nan")}}
results |= {"members": rows} if rows[1:] else {"lora": rows[0]}
(folder / "results.json").write_text(json.dumps(results))
"""


def stand_in(job, folder):
    ranks = " ".join(str(run.config.adapter.rank) for run in job.runs)
    return [sys.executable, "-S", "-c", STAND_IN, str(folder), ranks, *job.flags]


def test_a_failure_stops_no_other_and_is_tried_again(tmp_path, capsys):
    made = runs_of("adapter.rank=2,4; adapter.init=standard,pissa,olora")
    todo = combinations.make_jobs(made, {})
    assert [len(job.runs) for job in todo] == [2, 1, 1, 1, 1]
    bad = tmp_path / todo[1].name
    bad.mkdir()
    (bad / "fail").touch()
    (bad / "results.json").write_text("{}")  # of another try
    table = runs.RunTable(tmp_path)
    assert jobs.fill(table, todo, 2, stand_in) == 1
    told = capsys.readouterr().out
    assert "FAILED with exit code 3" in told and "what went wrong" in told
    left = [run for run in made if not table.finished(run)]
    assert left == [todo[1].runs[0]]
    line = table.latest(left[0])
    assert line["exit_code"] == 3 and line["tail"].endswith("what went wrong")
    assert "what went wrong" in pathlib.Path(line["log"]).read_text()
    for k, run in enumerate(todo[0].runs):
        line = table.latest(run)
        assert (line["member"], line["population"]) == (k, 2)
        assert line["results"]["lora"]["test_bpb"] == run.config.adapter.rank
        assert line["results"]["base"]["test_bpb"] is None and line["seconds"] > 0
        assert pathlib.Path(line["workdir"]) == tmp_path / todo[0].name
    (bad / "fail").unlink()
    again = combinations.make_jobs(left, {})
    assert jobs.fill(table, again, 2, stand_in) == 0
    assert all(runs.RunTable(tmp_path).finished(run) for run in made)
    assert "failed" not in runs.report(table, made)


def test_a_failed_population_is_a_failed_line_a_member(tmp_path, capsys):
    todo = combinations.make_jobs(runs_of("adapter.rank=2,4"), {})
    table = runs.RunTable(tmp_path)
    stale = tmp_path / todo[0].name / "results.json"
    stale.parent.mkdir()
    stale.write_text(json.dumps({"base": {}, "members": []}))  # of another try
    silent = lambda job, folder: [sys.executable, "-S", "-c", "print('all well')"]
    assert jobs.fill(table, todo, 1, silent) == 2
    assert [line["ok"] for line in table.lines] == [False, False]
    assert "results.json cannot be read" in table.lines[0]["tail"]
    assert "--populations=false runs its members one" in capsys.readouterr().out


SLEEPER = """
import pathlib, signal, sys, time
if sys.argv[2] != "gentle":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
folder = pathlib.Path(sys.argv[1])
(folder / "pid").write_text(str(__import__("os").getpid()))
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (signal.SIGTERM, "gentle"),
        (signal.SIGINT, "gentle"),
        (signal.SIGTERM, "stubborn"),
        (signal.SIGINT, "impatient"),
    ],
)
def test_a_signal_stops_the_children(tmp_path, number, kind):
    todo = combinations.make_jobs(runs_of("adapter.rank=2,4,8"), {}, populations=False)
    command = lambda job, own: [sys.executable, "-S", "-c", SLEEPER, str(own), kind]
    table = runs.RunTable(tmp_path)
    pids = [tmp_path / job.name / "pid" for job in todo[:2]]

    def interrupt():
        while not all(pid.exists() and pid.read_text() for pid in pids):
            time.sleep(0.02)
        os.kill(os.getpid(), number)
        if kind == "impatient":
            time.sleep(0.2)
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    before, began = signal.getsignal(number), time.monotonic()
    with pytest.raises(SystemExit) as left:
        finished = lambda job, lines: table.add(lines)
        grace = 0.3 if kind == "stubborn" else 30.0
        jobs.launch(todo, 2, command, tmp_path, finished, grace)
    thread.join()
    assert left.value.code == 128 + number and time.monotonic() - began < 20
    assert signal.getsignal(number) is before
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)
    assert table.lines == [] and not (tmp_path / todo[2].name).exists()


# The command


def launch(*given):
    return subprocess.run(
        [sys.executable, "-m", "experiments.sweep", *given],
        cwd=children.ROOT,
        env=children.environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )


TOY = (
    "--config=configs/quickstart.py:runlocal",
    "--config.run.methods=('lora',)",
    "--config.eval.source_bytes=256",
)


def test_a_bad_grid_fails_before_anything_runs(tmp_path):
    done = launch(*TOY, f"--workdir={tmp_path / 'x'}", "--grid=adapter.rnak=2")
    assert done.returncode == 1 and not (tmp_path / "x").exists()
    assert done.stderr.strip().startswith(
        "experiments.sweep: --grid: the config has no"
    )


@pytest.mark.slow
def test_a_sweep_and_a_member_is_its_run(tmp_path):
    cache = f"--config.run.cache_dir={tmp_path / 'cache'}"
    both = [*TOY, cache, f"--workdir={tmp_path / 's'}", "--jobs=2"]
    both += [f"--grid=adapter.rank=2,4; {RATE}=1e-2"]
    dry = launch(*both, "--dry_run")
    assert dry.returncode == 0 and "population of 2" in dry.stdout
    assert not (tmp_path / "s").exists()
    done = launch(*both)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = runs.RunTable(tmp_path / "s").lines
    assert [line["fields"]["adapter.rank"] for line in lines] == [2, 4]
    assert (tmp_path / "s" / "table.md").read_text() in done.stdout

    config = config_of(run__methods=("lora",), run__cache_dir=str(tmp_path / "cache"))
    config.eval.source_bytes = 256
    for line in lines:
        alone = copy.deepcopy(config)
        alone.adapter.rank = line["fields"]["adapter.rank"]
        assert combinations.digest(alone) == line["hash"]
    results = byte_model.train(alone, str(tmp_path / "alone"))
    for name in ("base", "lora"):
        np.testing.assert_allclose(
            lines[1]["results"][name]["test_bpb"], results[name]["test_bpb"], rtol=1e-5
        )
    # nothing is left to do; missing members of a population are run
    again = launch(*both)
    assert "2 finished before, 0 to do in 0 processes" in again.stdout
    assert again.returncode == 0
    assert runs.RunTable(tmp_path / "s").lines == lines
