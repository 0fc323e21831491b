"""What a sweep runs: a grid over fields of a config, and which runs train as one.

    values = grid.parse_grid("adapter.rank=2,8; adapter.init=pissa", config)
    runs = make_runs(config, values)
    jobs = make_jobs(runs, overrides={})

A job is one process of `experiments.main`: a single run, or a population. Runs become
one population if they differ only in LoRA's learning rate, rank and alpha, and their
init leaves the base as it is: members share base and batches. Runs with different
`run.seed` do not, because it also seeds the base and the order of the batches.

Alpha is taken as given: a grid over `adapter.rank` alone keeps `adapter.alpha`, so the
scale alpha / rank changes with the rank.
"""

import copy
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections

from experiments.search import grid
from experiments.trainer import optimizers
from lorax import adapters, inits

POOLED = {
    "optimizer.learning_rate.lora": "learning_rate",
    "adapter.rank": "rank",
    "adapter.alpha": "alpha",
}
"""Fields in which members of a population may differ -> their names in `population`."""
COMMON = ("base.test_bpb", "lora.test_bpb", "lora.trainable")
"""What both a population and a single run report."""


class Run(NamedTuple):
    """One point of the grid.

    Attributes:
      fields: the grid's fields -> their values here.
      config: the whole config.
      hash: the hash of `config`.
    """

    fields: dict[str, Any]
    config: ml_collections.ConfigDict
    hash: str

    def told(self) -> str:
        """Returns the values of its fields, as they would be typed."""
        return ", ".join(f"{k}={flag_text(v)}" for k, v in self.fields.items())


class Job(NamedTuple):
    """One process: a run, or a population of several.

    Attributes:
      name: of its folder.
      runs: the single run, or the members in order.
      flags: the config overrides that define it.
      why: why the run cannot be in a population; "" if it could.
    """

    name: str
    runs: tuple[Run, ...]
    flags: tuple[str, ...]
    why: str = ""


def make_runs(
    config: ml_collections.ConfigDict, values: Mapping[str, Sequence[Any]]
) -> list[Run]:
    """Returns every combination of `parse_grid`'s values, the last field fastest."""
    if any(value != () for value in config.get("population", {}).values()):
        raise ValueError(
            "config.population is set, but a sweep makes its populations itself; give "
            f"the values to --grid, as {', '.join(POOLED)}"
        )
    runs = []
    for point in itertools.product(*values.values()):
        fields, own = dict(zip(values, point, strict=True)), copy.deepcopy(config)
        for name, value in fields.items():
            holder, _, last = name.rpartition(".")
            grid.at(own, holder)[last] = value
        runs.append(Run(fields, own, digest(own)))
    return runs


def digest(config: ml_collections.ConfigDict) -> str:
    """Returns a hash of every value of a config, with references resolved."""
    text = json.dumps(config.to_dict(), sort_keys=True, default=repr)
    return _short(text)


def make_jobs(
    runs: Sequence[Run],
    overrides: Mapping[str, Any],
    *,
    populations: bool = True,
    metric: str = "",
    most: int = 16,
) -> list[Job]:
    """Groups the runs into as few processes as possible.

    Args:
      runs: those still to do.
      overrides: other fields that the command line sets, with their values.
      populations: False: every run is a process of its own.
      metric: the result that is asked for; a population reports only COMMON.
      most: most members of one population; each needs the activations of a run.
    """
    groups: dict[Any, list[Run]] = {}
    whys: dict[Any, str] = {}
    for run in runs:
        why = "--populations=false"
        if populations:
            why = apart(run.config)
            if not why and metric and metric not in COMMON:
                why = f"a population has no {metric}"
        key = run.hash if why else _pool(run.config)
        groups.setdefault(key, []).append(run)
        whys[key] = why
    jobs = []
    for key, group in groups.items():
        for start in range(0, len(group), most):
            members = tuple(group[start : start + most])
            flags = [*overrides.items(), *_flags_of(members)]
            text = tuple(f"--config.{name}={flag_text(value)}" for name, value in flags)
            name = members[0].hash
            if len(members) > 1:
                name = f"population-{_short(''.join(run.hash for run in members))}"
            jobs.append(Job(name, members, text, whys[key]))
    return jobs


def apart(config: ml_collections.ConfigDict) -> str:
    """Returns why a run cannot be a member of a population; "" if it can."""
    if "source" in config.model:
        return "runs from a checkpoint have no populations"
    if config.run.methods[:1] != ("lora",):
        return f"run.methods={config.run.methods} does not start with lora"
    init = inits.REGISTRY[config.adapter.init]
    if not init.keeps_base or init.stats:
        return f"adapter.init={config.adapter.init} does not leave the base as it is"
    for name in POOLED:
        holder, _, last = name.rpartition(".")
        if not grid.at(config, holder)[last] > 0:
            return f"{name} is not positive"
    return ""


def flag_text(value: Any) -> str:
    """Returns the text from which a config flag reads the value."""
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else repr(value)


def describe(runs: Sequence[Run], jobs: Sequence[Job], at_once: int) -> str:
    """Lists the jobs with their runs, and what to know about them."""
    left = sum(len(job.runs) for job in jobs)
    lines = [
        f"{len(runs)} runs: {len(runs) - left} finished before, {left} to do in "
        f"{len(jobs)} processes, {at_once} at once"
    ]
    for job in jobs:
        alone = f"alone ({job.why})" if job.why else "alone"
        size = len(job.runs)
        lines.append(f"{job.name}: {alone if size == 1 else f'population of {size}'}")
        for run in job.runs:
            lines.append(f"    {run.told()}")
    fields = runs[0].fields
    if "adapter.rank" in fields and "adapter.alpha" not in fields:
        lines.append("alpha is as given: the scale alpha / rank changes with the rank")
    pooled = [job for job in jobs if len(job.runs) > 1]
    beside = {m for job in pooled for m in job.runs[0].config.run.methods} - {"lora"}
    if beside:
        lines.append(
            f"populations train only lora, not {', '.join(sorted(beside))}; "
            "--populations=false, or a --metric of it, trains all of run.methods"
        )
    return "\n".join(lines)


def _pool(config: ml_collections.ConfigDict) -> str:
    """Returns a hash of the other fields, equal for runs that can share a program."""
    rest = copy.deepcopy(config)
    # AdaLoRA's allocation and Muon's width factor would see padded ranks.
    cls = adapters.get(config.adapter.adapter)
    padded = cls.padded and not cls.counts_ranks
    ranks = padded and config.optimizer.name not in optimizers.SEES_SHAPES
    for name in POOLED:
        if name != "adapter.rank" or ranks:
            holder, _, last = name.rpartition(".")
            del (held := grid.at(rest, holder).unlock())[last]
            held.lock()
    return "pool " + digest(rest)


def _flags_of(members: Sequence[Run]) -> list[tuple[str, Any]]:
    """Returns the grid's fields as overrides, as tuples where members differ."""
    flags = []
    for name, value in members[0].fields.items():
        values = tuple(member.fields[name] for member in members)
        if len(members) > 1 and name in POOLED:
            flags.append((f"population.{POOLED[name]}", values))
        else:
            flags.append((name, value))
    return flags


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
