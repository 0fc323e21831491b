"""What a sweep runs: a grid over fields of a config, and which runs go as one.

    runs = make_runs(config, parse_grid("adapter.rank=2,8; adapter.init=pissa", config))
    jobs = make_jobs(runs, overrides={})

A job is one process of `experiments.main`: a run of its own, or a population. Runs
become one population where they differ in nothing but LoRA's learning rate, rank and
alpha, and their init leaves the base as it is: members share base and batches. Runs of
different `run.seed` do not, for it seeds the base and the order of the batches too.

Alpha is as given: a grid over `adapter.rank` alone keeps `adapter.alpha`, so the scale
alpha / rank changes with it.
"""

import ast
import copy
import difflib
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections

POOLED = {
    "optimizer.learning_rate.lora": "learning_rate",
    "adapter.rank": "rank",
    "adapter.alpha": "alpha",
}
"""Fields in which members of a population may differ, and what it calls them."""
SHARES_BASE = ("standard", "gaussian")
"""The inits that leave the base as it is and look at no data."""
COMMON = ("base.test_bpb", "lora.test_bpb", "lora.trainable")
"""What a population and a run of its own both report."""
KINDS = (bool, int, float, str, tuple)


class Run(NamedTuple):
    """One point of the grid.

    Attributes:
      fields: its values, by the grid's fields.
      config: the whole of it.
      hash: of that.
    """

    fields: dict[str, Any]
    config: ml_collections.ConfigDict
    hash: str


class Job(NamedTuple):
    """One process: a run, or a population of several.

    Attributes:
      name: of its folder.
      runs: one, or the members in their order.
      flags: the overrides of the config that make it.
      why: the run is no member of a population; "" where it could be.
    """

    name: str
    runs: tuple[Run, ...]
    flags: tuple[str, ...]
    why: str = ""


# ------------------------------------------------------------------------- the grid


def parse_grid(
    text: str, config: ml_collections.ConfigDict, overridden: Iterable[str] = ()
) -> dict[str, list[Any]]:
    """Reads `field=value,value; field=value`.

    Commas and semicolons inside brackets or quotes do not split. A value is a Python
    literal where it is one, else a string; a field of strings takes any text.

    Args:
      text: the grid.
      config: whose fields they are.
      overridden: fields that the command line sets besides.

    Returns:
      Field -> its values, in the order given.

    Raises:
      ValueError: an unknown field, a value of another type than the field's, a field or
        value given twice, no values, or an open bracket or quote.

    Example:
      >>> config = ml_collections.ConfigDict({"adapter": {"rank": 8, "init": "x"}})
      >>> parse_grid("adapter.rank=2,4; adapter.init=pissa", config)
      {'adapter.rank': [2, 4], 'adapter.init': ['pissa']}
    """
    grid: dict[str, list[Any]] = {}
    overridden = set(overridden)
    for axis in filter(None, map(str.strip, split(text, ";"))):
        name, equals, values = (part.strip() for part in axis.partition("="))
        if not equals or not values:
            raise ValueError(f"--grid: {axis!r} has no values; write field=value,value")
        kind = kind_of(name, config)
        if name in grid or name in overridden:
            twice = "--grid" if name in grid else f"--config.{name}"
            raise ValueError(f"--grid: {name} is given here and by {twice}; keep one")
        grid[name] = []
        for value in map(str.strip, split(values, ",")):
            read = read_value(name, value, kind)
            if read in grid[name]:
                raise ValueError(f"--grid: {name} has the value {value} twice")
            grid[name].append(read)
    if not grid:
        raise ValueError("--grid is empty; write field=value,value; field=value")
    return grid


def split(text: str, separator: str) -> list[str]:
    """Splits where the separator is inside no bracket and no quote."""
    parts, closing, quote = [""], [], ""
    pairs = {"(": ")", "[": "]", "{": "}"}
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in pairs:
            closing.append(pairs[letter])
        elif closing and letter == closing[-1]:
            closing.pop()
        elif letter == separator and not closing:
            parts.append("")
            continue
        parts[-1] += letter
    if quote or closing:
        raise ValueError(f"--grid: {text!r} lacks a closing {quote or closing[-1]}")
    return parts


def fields_of(config: ml_collections.ConfigDict, prefix: str = "") -> list[str]:
    """The names of all fields, sections apart, with dots."""
    names = []
    for name in config:
        held = config[name] if config.get(name) is not None else None
        if isinstance(held, ml_collections.ConfigDict):
            names += fields_of(held, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def kind_of(name: str, config: ml_collections.ConfigDict) -> type:
    """The type of a field; ValueError for what is no field, or cannot be swept."""
    known = fields_of(config)
    if name.startswith("population."):
        raise ValueError(
            f"--grid: {name}: a sweep makes its populations itself; give "
            f"{', '.join(POOLED)}"
        )
    if inside := [field for field in known if field.startswith(f"{name}.")]:
        raise ValueError(f"--grid: {name} is a section; it has {', '.join(inside)}")
    if name not in known:
        last = name.rpartition(".")[2]
        near = [field for field in known if field.rpartition(".")[2] == last]
        near += difflib.get_close_matches(name, known, n=4, cutoff=0.5)
        told = ", ".join(dict.fromkeys(near)) or f"sections {', '.join(config)}"
        raise ValueError(f"--grid: the config has no field {name}; near it: {told}")
    holder, _, last = name.rpartition(".")
    kind = _at(config, holder).get_type(last)
    if kind not in KINDS:
        raise ValueError(
            f"--grid: {name} is of type {kind.__name__}, which no flag can set"
        )
    return kind


def read_value(name: str, text: str, kind: type) -> Any:
    """Reads a value as the type of its field; ValueError if it is of another."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if kind is str:
        return value if isinstance(value, str) else text
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        like = {tuple: ", such as ('a', 'b') or (1,)"}.get(kind, "")
        raise ValueError(
            f"--grid: {name}={text}: the field holds {kind.__name__}{like}; this is "
            f"{type(value).__name__}"
        )
    return value


# ------------------------------------------------------------------------- the runs


def make_runs(
    config: ml_collections.ConfigDict, grid: Mapping[str, Sequence[Any]]
) -> list[Run]:
    """Returns every combination of the grid's values, the last field fastest."""
    if any(value != () for value in config.get("population", {}).values()):
        raise ValueError(
            "config.population is set: a sweep makes its populations itself; give the "
            f"values to --grid, as {', '.join(POOLED)}"
        )
    runs = []
    for values in itertools.product(*grid.values()):
        fields, own = dict(zip(grid, values, strict=True)), copy.deepcopy(config)
        for name, value in fields.items():
            holder, _, last = name.rpartition(".")
            _at(own, holder)[last] = value
        runs.append(Run(fields, own, digest(own)))
    return runs


def digest(config: ml_collections.ConfigDict) -> str:
    """A hash of every value of a config, references resolved."""
    text = json.dumps(config.to_dict(), sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_jobs(
    runs: Sequence[Run],
    overrides: Mapping[str, Any],
    *,
    populations: bool = True,
    metric: str = "",
    most: int = 16,
) -> list[Job]:
    """Groups the runs into as few processes as may be.

    Args:
      runs: those still to do.
      overrides: fields that the command line sets besides, with their values.
      populations: False: every run goes alone.
      metric: what is asked of the results; a population reports COMMON alone.
      most: members of one population; each takes the activations of a run.
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
                name = hashlib.sha256("".join(r.hash for r in members).encode())
                name = "population-" + name.hexdigest()[:16]
            jobs.append(Job(name, members, text, whys[key]))
    return jobs


def apart(config: ml_collections.ConfigDict) -> str:
    """Why a run cannot be a member of a population; "" if it can."""
    if "source" in config.model:
        return "runs from a checkpoint have no populations"
    if config.run.methods[:1] != ("lora",):
        return f"run.methods={config.run.methods} starts with another than lora"
    if config.adapter.init not in SHARES_BASE:
        return f"adapter.init={config.adapter.init} does not leave the base as it is"
    for name in POOLED:
        holder, _, last = name.rpartition(".")
        if not _at(config, holder)[last] > 0:
            return f"{name} is not positive"
    return ""


def flag_text(value: Any) -> str:
    """The text from which a flag of the config reads the value."""
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else repr(value)


def describe(runs: Sequence[Run], jobs: Sequence[Job], at_once: int) -> str:
    """Lists the jobs, each with its runs, and says what to know of them."""
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
            values = run.fields.items()
            lines.append("    " + ", ".join(f"{k}={flag_text(v)}" for k, v in values))
    fields = runs[0].fields
    if "adapter.rank" in fields and "adapter.alpha" not in fields:
        lines.append("alpha is as given: the scale alpha / rank changes with the rank")
    pooled = [job for job in jobs if len(job.runs) > 1]
    beside = {m for job in pooled for m in job.runs[0].config.run.methods} - {"lora"}
    if beside:
        lines.append(
            f"populations train lora alone, not {', '.join(sorted(beside))}; "
            "--populations=false trains all of run.methods"
        )
    return "\n".join(lines)


def _at(config: ml_collections.ConfigDict, path: str) -> Any:
    for name in filter(None, path.split(".")):
        config = config[name]
    return config


def _pool(config: ml_collections.ConfigDict) -> str:
    """Equal for the runs that one population can hold: a hash of all else."""
    rest = copy.deepcopy(config)
    # AdaLoRA's allocation and Muon's factor of the width would see padded ranks.
    ranks = config.adapter.adapter != "adalora" and config.optimizer.name != "muon"
    for name in POOLED:
        if name != "adapter.rank" or ranks:
            holder, _, last = name.rpartition(".")
            del (held := _at(rest, holder).unlock())[last]
            held.lock()
    return "pool " + digest(rest)


def _flags_of(members: Sequence[Run]) -> list[tuple[str, Any]]:
    """The grid's fields as overrides; what members differ in, as tuples."""
    flags = []
    for name, value in members[0].fields.items():
        values = tuple(member.fields[name] for member in members)
        if len(members) > 1 and name in POOLED:
            flags.append((f"population.{POOLED[name]}", values))
        else:
            flags.append((name, value))
    return flags
