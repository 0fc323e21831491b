"""What the studies share: paired differences, their table and their figure.

A result is `{"rate": learning rate, "curves": [seed][point]}`, where lower is better;
"LoRA" is the method that the others are compared with.
"""

import hashlib
import json
import math
import pathlib
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from experiments import paired
from experiments.machine import disk, tables
from experiments.studies.method import panels
from lorax.checkpoint import folders

_FOLDER = flags.DEFINE_string("study_dir", None, "Where results and figures go.")
SEEDS = flags.DEFINE_integer("seeds", 5, "Seeds to report.", lower_bound=2)

WIDER = 3
"""How many rates beyond a grid may be tried while the best lies at its edge."""


def folder(name: str) -> pathlib.Path:
    """Returns the study's folder, created if missing."""
    made = pathlib.Path(_FOLDER.value or f"runs/{name}")
    folders.require_directory(made)
    made.mkdir(parents=True, exist_ok=True)
    return made


def publish(
    folder: pathlib.Path, found: Mapping[str, Any], page: Callable[[Any], str]
) -> None:
    """Writes `results.json` and `table.md`, and prints the table.

    Args:
      folder: of the study.
      found: its results, as JSON values.
      page: returns the markdown of results.
    """
    disk.replace(folder / "results.json", json.dumps(found) + "\n")
    disk.replace(folder / "table.md", page(found))
    print(page(found))


def digest(*told: Any) -> str:
    """Returns 16 hexadecimal digits of what runs depend on, by value, as JSON."""
    line = json.dumps(told, sort_keys=True, default=str)
    return hashlib.sha256(line.encode()).hexdigest()[:16]


class NotRun(Exception):
    """A run is missing, and may not be made now."""


class Runs:
    """Runs by key, each a line of a file, so that an interrupted study resumes.

    Attributes:
      lines: by key, `{"key", "settings", "seconds", "cpu_seconds", "curve", ...}`.
    """

    def __init__(
        self,
        path: pathlib.Path,
        settings: Mapping[str, str],
        minutes: float | None = None,
    ) -> None:
        """Reads the lines that were made under the same settings.

        Args:
          path: of the file of JSON lines.
          settings: a digest for each first part of a key.
          minutes: time limit for new runs.
        """
        self._path, self._settings = path, settings
        self._until = math.inf if minutes is None else time.time() + 60 * minutes
        self.lines: dict[tuple[Hashable, ...], dict[str, Any]] = {}
        for line in disk.read_lines(path) if path.exists() else ():
            if settings.get(line["key"][0]) == line["settings"]:
                self.lines[_exact(line["key"])] = line

    def get(
        self,
        key: tuple[Hashable, ...],
        make: Callable[[], Any] | None = None,
    ) -> list[float]:
        """Returns the curve of a run, as `line` does."""
        return self.line(key, make)["curve"]

    def line(
        self,
        key: tuple[Hashable, ...],
        make: Callable[[], Any] | None = None,
    ) -> dict[str, Any]:
        """Returns the line of a run, which is made if missing.

        Args:
          key: JSON values, the first of them a key of `settings`.
          make: trains, and returns the curve, or a dict with "curve" and more JSON;
            None: the run must exist.

        Raises:
          NotRun: it is missing, and there is no time left or no `make`.
        """
        key = _exact(key)
        if key not in self.lines:
            if make is None or time.time() > self._until:
                raise NotRun(" ".join(map(str, key[1:])))
            began, work = time.time(), time.process_time()
            made = make()
            made = made if isinstance(made, Mapping) else {"curve": made}
            curve = [float(value) for value in made["curve"]]
            line: dict[str, Any] = {"key": key, "settings": self._settings[str(key[0])]}
            line["seconds"] = round(time.time() - began, 1)
            line["cpu_seconds"] = round(time.process_time() - work, 1)
            line |= {**made, "curve": curve}
            disk.append(self._path, line)
            self.lines[key] = line
            print(*key, curve[-1], f"({line['seconds']:.0f} s)", flush=True)
        return self.lines[key]


def _exact(key: Sequence[Hashable]) -> tuple[Hashable, ...]:
    """Returns the key with its numbers as they are printed."""
    return tuple(f"{x:.3g}" if isinstance(x, float) else x for x in key)


def best_of_grid(
    score: Callable[[float], float], grid: Sequence[float], widen: int = WIDER
) -> float:
    """Returns the best learning rate of a grid, which is widened if it is at an edge.

    Args:
      score: scores a learning rate; lower is better, and NaN is worst.
      grid: learning rates, a constant ratio apart.
      widen: how many rates beyond the grid may be tried, one at a time, while the best
        lies at the edge.
    """
    rates = sorted(grid)
    factor = rates[1] / rates[0]

    def value(rate: float) -> float:
        return math.inf if math.isnan(score(rate)) else score(rate)

    best = min(rates, key=value)
    for _ in range(widen):
        if best not in (rates[0], rates[-1]):
            break
        beyond = rates[0] / factor if best == rates[0] else rates[-1] * factor
        rates = sorted((*rates, beyond))
        best = min((best, beyond), key=value)
    return best


def table(
    results: Mapping[str, Any],
    every: int = 1,
    digits: int = 4,
    baseline: str = "LoRA",
) -> str:
    """Returns markdown: method, rate, final value, paired difference, steps.

    Args:
      results: by method.
      every: steps between two points of a curve.
      digits: decimal places.
      baseline: the method that the others are compared with.
    """
    header = ["method", "rate", "final", f"minus {baseline} (95 %)"]
    header.append(f"steps to {baseline}'s final")
    return tables.markdown(header, summary(results, every, digits, baseline))


def summary(
    results: Mapping[str, Any],
    every: int = 1,
    digits: int = 4,
    baseline: str = "LoRA",
) -> list[list[str]]:
    """Returns the rows of `table`."""
    lora = np.array(results[baseline]["curves"])
    goal = lora[:, -1].mean()
    rows = []
    for name, result in results.items():
        curves = np.array(result["curves"])
        final, off = curves[:, -1], curves[:, -1] - lora[:, -1]
        reached = np.flatnonzero(curves.mean(0) <= goal)
        error = paired.standard_error(final)
        verdict = "-" if name == baseline else paired.difference(off, digits)
        rows.append(
            [
                name,
                f"{result['rate']:.2g}",
                f"{final.mean():.{digits}f} +- {error:.{digits}f}",
                verdict,
                str(every * (reached[0] + 1)) if len(reached) else "not",
            ]
        )
    return rows


def heading(docstring: str, figure: str | None = None) -> str:
    """Returns the head of a study's page: its module's docstring, and its figure.

    Args:
      docstring: the module's; indented lines are its command.
      figure: its path, relative to the page.
    """
    title, _, text = docstring.strip().partition("\n")
    picture = [f"![{title}]({figure})\n"] if figure else []
    return "\n".join([f"# {title}", text, "", *picture])


def draw(
    results: Mapping[str, Mapping[str, Any]],
    path: pathlib.Path,
    labels: Sequence[str],
    every: int = 1,
) -> None:
    """Draws the mean curves of every problem, each in its own panel.

    Args:
      results: by problem and method.
      path: of the PNG.
      labels: of the axes, units included.
      every: steps between two points of a curve.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (4.5 * len(results), 4.2)
    figure, axes = plt.subplots(1, len(results), figsize=size, layout="constrained")
    for axis, (title, methods) in zip(
        np.atleast_1d(axes), results.items(), strict=True
    ):
        for colour, (name, result) in zip(
            tables.COLOURS, methods.items(), strict=False
        ):
            curve = np.array(result["curves"]).mean(0)
            steps = every * np.arange(1, len(curve) + 1)
            axis.semilogy(steps, curve, label=name, color=colour)
        axis.set(title=title, xlabel=labels[0], ylabel=labels[1])
        axis.legend()
        panels.tidy(axis)
    figure.savefig(path, dpi=110)
    plt.close(figure)
