"""The common ground of the studies: a byte model of Python source learns English.

Base and task are those of `configs/quickstart.py`; an arm changes fields of its config.
It gets four learning rates half a decade apart, and up to three more while the best
lies at the edge, on seed 0 and the `selection` documents; at the best rate, it is
reported for fresh seeds on the `test` documents. All arms share the seeds, so batches
and keys are paired.
"""

import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections

import lorax
from configs import quickstart
from experiments.machine import timing
from experiments.studies.method import comparison, shared, trial

GRID = (10**-3, 10**-2.5, 10**-2, 10**-1.5)
SEEDS = (1, 2, 3, 4)
TOY_RANK = 16  # the largest rank at toy sizes
STRETCH = 3  # steps timed together: AdaLoRA chooses its triplets every third
Fields = Mapping[str, Any]


class Study(NamedTuple):
    """A question, and the arms that answer it.

    Attributes:
      name: of its folder.
      question: one sentence.
      arms: arm -> the fields of the config that it changes.
      baseline: the arm that others are compared with.
      grids: learning rates of arms that do not use GRID.
      steps: of a run.
      every: steps between two evaluations.
      seeds: the reported seeds.
      refine: tries two more rates, half-way to the neighbours of an arm's best.
      watch: `(setting, rates chosen so far) -> watch` for `trial.make_run`, for the
        reported runs; None to watch nothing.
    """

    name: str
    question: str
    arms: Mapping[str, Fields]
    baseline: str
    grids: Mapping[str, tuple[float, ...]] = {}
    steps: int = 90
    every: int = 10
    seeds: tuple[int, ...] = SEEDS
    refine: bool = False
    watch: Callable[[Any, Any], Callable[..., Any]] | None = None


def configured(study: Study, fields: Fields, toy: bool) -> ml_collections.ConfigDict:
    """Returns the quickstart's config with an arm's fields in place."""
    config = quickstart.get_config("runlocal" if toy else None).unlock()
    config.run.steps = study.steps
    config.run.methods = ("lora",)
    config.update_from_flattened_dict(dict(fields))
    if toy:
        config.adapter.rank = min(config.adapter.rank, TOY_RANK)
    return config.lock()


def digest(study: Study, fields: Fields, toy: bool) -> str:
    """Returns a digest of everything that a run of the arm depends on."""
    config = configured(study, fields, toy).to_dict()
    # Where a run is saved, what it logs and who tuned it make no difference to it.
    config["run"] = {name: config["run"][name] for name in ("seed", "steps", "methods")}
    del config["optimizer"]["tuned"]
    return comparison.digest(config, study.every, jax.__version__)


def run(study: Study, setting: shared.Setting, runs: comparison.Runs) -> None:
    """Makes the missing runs of every arm."""
    for arm in study.arms:
        _run_arm(study, arm, setting, runs)


def times(
    study: Study, setting: shared.Setting, arms: Sequence[str], rounds: int = 7
) -> dict[str, float]:
    """Returns milliseconds of a train step by arm, interleaved, the best of `rounds`.

    Times taken while a study runs are not comparable: other work may slow some arms.
    """
    steps = {arm: _stretch(study, arm, setting) for arm in arms}
    seconds = timing.interleave(steps, rounds)
    return {arm: 1e3 * min(s) / STRETCH for arm, s in seconds.items()}


def _stretch(study: Study, arm: str, setting: shared.Setting) -> Callable[[], Any]:
    """Returns a function that makes a few more steps of an arm at each call."""
    config, given = _given(study, arm, setting)
    batches = setting.train(config)(0)
    prepared = trial.make_start(*given)(0, 1e-4)
    state = prepared.state

    def run() -> Any:
        nonlocal state
        for i in range(STRETCH):
            state, _ = prepared.step(state, prepared.params, batches[i])
        return state

    return run


def _given(
    study: Study, arm: str, setting: shared.Setting
) -> tuple[Any, tuple[Any, ...]]:
    """Returns the config of an arm, and the arguments of `trial.make_start`."""
    config = configured(study, study.arms[arm], setting.toy)
    task, batches = setting.task(config), setting.train(config)
    return config, (config, task.loss_fn, task.base, batches, config.run.methods[0])


def _run_arm(
    study: Study, arm: str, setting: shared.Setting, runs: comparison.Runs
) -> None:
    config, given = _given(study, arm, setting)
    make, task = trial.make_run(*given), setting.task(config)

    def score(rate: float) -> float:
        def once() -> dict[str, Any]:
            return make(0, rate, task.choose, config.run.steps)._asdict()

        return runs.get((arm, "choose", 0, rate), once)[-1]

    rate = best_rate(study, arm, score, setting.toy)
    watch = None
    if study.watch is not None:
        watch = study.watch(setting, chosen(study, runs, setting.toy))
    for seed in seeds_of(study, setting.toy):

        def reported(seed: int = seed) -> dict[str, Any]:
            return make(seed, rate, task.report, study.every, watch)._asdict()

        runs.line((arm, "report", seed, rate), reported)


def seeds_of(study: Study, toy: bool) -> tuple[int, ...]:
    """Returns the seeds that an arm reports."""
    return study.seeds[: 2 if toy else None]


def grid_of(study: Study, arm: str, toy: bool) -> tuple[float, ...]:
    """Returns the learning rates that an arm gets."""
    grid = study.grids.get(arm, GRID)
    return grid[:2] if toy else grid


def best_rate(
    study: Study, arm: str, score: Callable[[float], float], toy: bool
) -> float:
    """Returns the learning rate of an arm with the lowest score."""
    grid = grid_of(study, arm, toy)
    best = comparison.best_of_grid(score, grid, 1 if toy else comparison.WIDER)
    if not study.refine:
        return best
    half = (grid[1] / grid[0]) ** 0.5
    return comparison.best_of_grid(score, (best / half, best, best * half), widen=0)


def chosen(study: Study, runs: comparison.Runs, toy: bool) -> dict[str, float]:
    """Returns the rates of the arms that have one."""
    found = {}
    for arm in study.arms:

        def known(rate: float, arm: str = arm) -> float:
            return runs.get((arm, "choose", 0, rate))[-1]

        try:
            found[arm] = best_rate(study, arm, known, toy)
        except comparison.NotRun:
            continue
    return found


def results(
    study: Study,
    runs: comparison.Runs,
    toy: bool = False,
    ms: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Returns what a study found, as JSON.

    Args:
      study: the study.
      runs: the runs so far.
      toy: whether sizes are toy sizes.
      ms: milliseconds of a step, by the config's digest; for a missing arm, the fastest
        stretch of any of its runs is taken.

    Returns:
      "arms": for each finished one, its `rate`, the `grid` of rates and scores, the
      `curves` of its seeds, what was `watched`, and `ms` of a step; "missing": what was
      not run; and where, how and at what cost.
    """
    arms, missing = {}, []
    rates = chosen(study, runs, toy)
    for arm in study.arms:
        own = {key: line for key, line in runs.lines.items() if key[0] == arm}
        try:
            if arm not in rates:
                raise comparison.NotRun("its learning rates")
            keys = [(arm, "report", s, rates[arm]) for s in seeds_of(study, toy)]
            lines = [runs.line(key) for key in keys]
        except comparison.NotRun as error:
            missing.append(f"{arm}: {error}")
            continue
        own_digest = digest(study, study.arms[arm], toy)
        arms[arm] = {
            "rate": rates[arm],
            "grid": {k[3]: v["curve"][-1] for k, v in own.items() if k[1] == "choose"},
            "curves": [line["curve"] for line in lines],
            "watched": [line.get("watched") for line in lines],
            "ms": (ms or {}).get(own_digest)
            or min(line["ms"] for line in own.values()),
            "config": own_digest,
        }
    hours = sum(line["cpu_seconds"] for line in runs.lines.values()) / 3600
    return {
        "study": study.name,
        "question": study.question,
        "baseline": study.baseline,
        "steps": study.steps,
        "every": study.every,
        "smoke": toy,
        "arms": arms,
        "missing": missing,
        "runs": len(runs.lines),
        "cpu_hours": round(hours, 3),
        "jax": jax.__version__,
        "lorax": lorax.__version__,
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
    }
