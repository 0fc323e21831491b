r"""Runs a config over a grid of its fields, and prints a table of the results.

    lorax sweep --config=quickstart --workdir=runs/sweep \
        --grid="adapter.rank=2,8; optimizer.learning_rate.lora=5e-3,1e-2" --jobs=2

`--dry_run` lists the runs and how they are grouped into processes. Finished runs are
kept in `runs.jsonl` (see `experiments/search/runs.py`); the same command resumes from
there, and retries what failed. `--config.field=value` sets a field of every run.

Runs that differ only in LoRA's learning rate, rank and alpha train as one population,
each member as it would have trained alone; "full" and the source's bits per byte are
then left out. Alpha is taken as given: a grid over ranks alone also changes the scale
alpha / rank. The table is sorted by a reported figure; to choose hyperparameters on
documents other than those reported, use `lorax tune`.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

from experiments.reading import checking, command
from experiments.search import combinations, grid, jobs

_CONFIG = config_flags.DEFINE_config_file("config", None, command.CONFIG)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of all runs; `runs/<run.name>-sweep` by default."
)
_GRID = flags.DEFINE_string("grid", None, "`field=value,value; field=value,value`.")
_JOBS = flags.DEFINE_integer("jobs", 1, "Processes at a time.", lower_bound=1)
_POPULATIONS = flags.DEFINE_bool("populations", True, "Train similar runs together.")
_MEMBERS = flags.DEFINE_integer(
    "members", 16, "Maximum members of a population.", lower_bound=1
)
_METRIC = flags.DEFINE_string(
    "metric", "", "Result to sort by, such as lora.test_bpb; else the task's own."
)
_BEST = flags.DEFINE_enum("best", "auto", ["auto", "min", "max"], "Which comes first.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "List the runs, and run none.")


def main(argv: Sequence[str]) -> None:
    """Sweeps as the flags say."""
    if len(argv) > 1:
        raise app.UsageError(f"arguments that are not flags: {argv[1:]}")
    config = _CONFIG.value
    folder = pathlib.Path(_WORKDIR.value or f"runs/{config.run.name}-sweep")
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    asked = jobs.Asked(
        config=config_flags.get_config_filename(flags.FLAGS["config"]),
        overrides=overrides,
        at_once=_JOBS.value,
        populations=_POPULATIONS.value,
        members=_MEMBERS.value,
        metric=_METRIC.value,
        best=_BEST.value,
        dry_run=_DRY_RUN.value,
    )
    with command.refusing():
        values = grid.parse_grid(_GRID.value or "", config, overrides)
        every = combinations.make_runs(config, values)
        checking.check_runs((run.told(), run.config) for run in every)
        sys.exit(jobs.sweep(folder, every, asked))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "grid"])
    command.run(main)
