"""Runs the studies that share the quickstart's text, and writes what they found.

    python -m experiments.studies.run --study=ranks
    python -m experiments.studies.run --study=all --minutes=60
    python -m experiments.studies.run --study=all:smoke

A study's folder (in `--study_dir`, by default `runs/studies`; the committed ones are in
`docs/results/studies`) gets `runs.jsonl`, with a line for each run, so that an
interrupted study resumes; `times.json`, the step times of all arms, measured together
once the runs are there (delete it to measure again); `results.json`, and the figure.
`:smoke` tests the code at toy sizes in `runs/smoke`: its figures are marked, and
`experiments.report` refuses its results.
"""

import importlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from experiments.machine import disk
from experiments.studies.method import comparison, findings, panels, shared, text

_STUDY = flags.DEFINE_string("study", None, "A study, or all; with :smoke, toy sizes.")
_MINUTES = flags.DEFINE_float("minutes", None, "Time limit for new runs.")


def main(argv: Sequence[str]) -> None:
    """Resumes one study or all, and prints the tables."""
    del argv
    name, _, form = (_STUDY.value or "").partition(":")
    if form not in ("", "smoke"):
        raise app.UsageError(f"--study={_STUDY.value}: the form is NAME or NAME:smoke")
    if name != "all" and name not in findings.STUDIES:
        raise app.UsageError(
            f"--study={name}: choose {', '.join(findings.STUDIES)}, all"
        )
    toy = form == "smoke"
    top = comparison.folder("smoke" if toy else "studies")
    setting = None
    for study in findings.STUDIES if name == "all" else (name,):
        module = importlib.import_module(f"experiments.studies.questions.{study}")
        folder = top / study
        folder.mkdir(exist_ok=True)
        setting = setting or shared.Setting(pathlib.Path("runs/studies"), toy)
        found = go_on(module, setting, folder, _MINUTES.value)
        print(f"\n{findings.section(module, found)}\n", flush=True)


def go_on(
    module: Any, setting: shared.Setting, folder: pathlib.Path, minutes: float | None
) -> dict[str, Any]:
    """Makes missing runs, writes results and figure, and returns the results.

    Args:
      module: of the study, with STUDY and PANELS.
      setting: what the studies share.
      folder: where its files go.
      minutes: time limit for new runs.
    """
    study = module.STUDY
    settings = {
        arm: text.digest(study, fields, setting.toy)
        for arm, fields in study.arms.items()
    }
    runs = comparison.Runs(folder / "runs.jsonl", settings, minutes)
    try:
        text.run(study, setting, runs)
    except comparison.NotRun as error:
        print(f"cut short after {minutes} minutes, before {error}")
    found = text.results(study, runs, setting.toy)
    path = folder / "times.json"
    times = json.loads(path.read_text()) if path.exists() else {}
    if not {arm["config"] for arm in found["arms"].values()} <= set(times):
        ms = text.times(study, setting, list(found["arms"]))
        times = {settings[arm]: round(value, 3) for arm, value in ms.items()}
        disk.replace(path, json.dumps(times, indent=1) + "\n")
    found = text.results(study, runs, setting.toy, times)
    disk.replace(folder / "results.json", json.dumps(found, indent=1) + "\n")
    if study.baseline in found["arms"]:
        panels.figure(found, folder / "figure.png", *module.PANELS)
    return found


if __name__ == "__main__":
    flags.mark_flag_as_required("study")
    app.run(main)
