"""A run as one HTML page: results, curves, spectra of its updates, ranks, config."""

import html
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from experiments.machine import disk, record
from experiments.pages import drawings
from experiments.trainer import metric_log
from lorax import adapters as parametrisations
from lorax import analysis, checkpoint, compose
from lorax.types import Adapters

NAME = "report.html"
LEFT_OUT = ("run", "step", "time", "weight", "skipped", "bytes", "nats")
"""Keys in metrics.jsonl that get no curve."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; color: #222; background: #fff; }}
h1, h2 {{ line-height: 1.2; }} h2 {{ margin-top: 2.5rem; }}
table {{ border-collapse: collapse; }}
td {{ padding: .2rem 1rem .2rem 0; border-bottom: 1px solid #ddd;
  vertical-align: top; }}
td:last-child {{ font-variant-numeric: tabular-nums; }}
svg {{ display: block; max-width: 100%; height: auto; }}
pre {{ overflow: auto; background: #f6f6f6; padding: 1rem; }}
@media (prefers-color-scheme: dark) {{
  body {{ color: #ddd; background: #1e2026; }} a {{ color: #8ab4f8; }}
  td {{ border-color: #444; }} pre {{ background: #2a2d35; }}
  svg {{ filter: invert(1) hue-rotate(180deg); }}
}}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def write(folder: pathlib.Path) -> pathlib.Path:
    """Writes `report.html` into the folder of a run, and returns its path.

    Raises:
      FileNotFoundError: the folder holds no run.
      ValueError: a file of the run cannot be read.
    """
    if not (folder / "metrics.jsonl").exists():
        runs = sorted(path.parent.name for path in folder.glob("*/metrics.jsonl"))
        hint = f"; there are runs below it: {', '.join(runs)}" if runs else ""
        raise FileNotFoundError(
            f"{folder} has no metrics.jsonl, so it is not the folder of a run{hint}"
        )
    told = _json(folder / record.FILE)
    parts = [
        _section("What was run", _table(_facts(told))),
        _section("Results", _table(_flat(_json(folder / "results.json")))),
        _section("Curves", *_curves(metric_log.read(folder))),
        *(_updates(path) for path in _adapters(folder)),
        _section("Config", f"<pre>{html.escape(_config(told))}</pre>"),
    ]
    page = PAGE.format(title=html.escape(folder.name), body="\n".join(parts))
    disk.replace(folder / NAME, page)
    return folder / NAME


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _section(title: str, *parts: str) -> str:
    shown = "\n".join(part for part in parts if part)
    return f"<h2>{html.escape(title)}</h2>\n{shown or '<p>Nothing was written.</p>'}"


def _facts(told: Mapping[str, Any]) -> dict[str, str]:
    """Returns everything in run.json but the config, as rows."""
    facts = {name: str(told[name]) for name in ("command", "began") if name in told}
    for name, value in told.get("commit", {}).items():
        facts[f"commit of {name}" if name == "lorax" else f"commit, {name}"] = (
            value or "not in a git repository"
        )
    versions = told.get("versions", {}).items()
    facts |= (
        {"versions": ", ".join(f"{k} {v}" for k, v in versions)} if versions else {}
    )
    return facts


def _config(told: Mapping[str, Any]) -> str:
    """Returns the config as lines `a.b = value`."""
    values = _flat(told.get("config", {}))
    if not values:
        return "run.json is missing: the run was not started by `lorax run`"
    return "\n".join(f"{name} = {value}" for name, value in values.items())


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns the leaves of nested dicts by dotted names, formatted for people."""
    rows: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for i, part in enumerate(value):
                rows |= _flat(part, f"{prefix}{name}.{i}.")
        else:
            rows[prefix + name] = _number(value)
    return rows


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def _table(rows: Mapping[str, str]) -> str:
    cells = (
        f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>"
        for k, v in rows.items()
    )
    return f"<table>{''.join(cells)}</table>" if rows else ""


def _curves(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns a figure for every metric with two or more steps, with a line per run."""
    found: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for row in rows:
        for name in row.keys() - set(LEFT_OUT):
            if isinstance(row[name], int | float):
                steps, values = found.setdefault(name, {}).setdefault(
                    row["run"], ([], [])
                )
                steps.append(row["step"])
                values.append(row[name])
    order = sorted(found, key=lambda name: (name != "loss", name))
    drawn = {
        name: {run: line for run, line in found[name].items() if len(line[0]) > 1}
        for name in order
    }
    return [drawings.lines(kept, "step", name) for name, kept in drawn.items() if kept]


def _adapters(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the adapter folders: a single one, or those of a population's members."""
    members = sorted(folder.glob("members/*"), key=lambda path: int(path.name))
    return [path for path in (folder / "adapter", *members) if path.is_dir()]


def _updates(path: pathlib.Path) -> str:
    """Draws spectra and ranks of the updates in a folder of adapters."""
    adapters = checkpoint.load_adapters(path)
    initial = path.parent / "initial"
    if initial.is_dir():  # the init moved a part of the kernels into the factors
        adapters = compose.to_lora(adapters, checkpoint.load_adapters(initial))
    name = "adapter" if path.name == "adapter" else f"member {path.name}"
    title = f"Updates: {name}"
    try:
        found = analysis.singular_values(adapters)
    except ValueError as error:
        return _section(title, f"<p>{html.escape(str(error))}</p>")
    ranks = {p: np.asarray(analysis.effective_rank(v)) for p, v in found.items()}
    flat = {
        p: r if r.ndim < 2 else r.reshape(len(r), -1).mean(1) for p, r in ranks.items()
    }
    return _section(
        title,
        drawings.lines(
            _spectra(found),
            "singular value",
            "size, of the largest",
            logarithmic=True,
        ),
        drawings.rank_map(flat, "effective rank of the update"),
        _kept(adapters, found),
    )


def _spectra(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns singular values over the largest, averaged over the layers of a stack."""
    series = {}
    for path, found in values.items():
        found = np.asarray(found)
        top = np.where(found[..., :1] > 0, found[..., :1], 1)
        mean = (found / top).reshape(-1, found.shape[-1]).mean(0)
        series[path.removesuffix("/kernel")] = range(1, len(mean) + 1), mean
    return series


def _kept(adapters: Adapters, values: Mapping[str, Any]) -> str:
    """Draws how many ranks are left, for methods that prune them, such as AdaLoRA."""
    left = {
        path: (values[path] > 1e-6 * values[path].max()).sum(-1)
        for path, adapter in adapters.items()
        if parametrisations.get(type(adapter)).counts_ranks and path in values
    }
    return drawings.rank_map(left, "ranks that are left") if left else ""
