"""Tables and figures: markdown, colours, and how they were measured."""

import datetime
import os
import pathlib
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from experiments.machine import record

COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7"),
    *("#E69F00", "#56B4E9", "#F0E442", "#000000"),
)
"""Okabe and Ito's palette, distinguishable with any colour vision."""


def about(packages: Sequence[str]) -> dict[str, Any]:
    """Returns how a table was measured: date, command, device, versions, malloc.

    Args:
      packages: names of packages; those that are not installed are left out.
    """
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join([record.program(), *sys.argv[1:]]),
        "device": _device(),
        "versions": record.versions(packages),
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ""),
    }


def caption(facts: Mapping[str, Any]) -> str:
    """Returns `about` in one sentence."""
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items())
    malloc = facts["GLIBC_TUNABLES"]
    command = f"{f'GLIBC_TUNABLES={malloc} ' if malloc else ''}{facts['command']}"
    return f"{facts['date']}, {facts['device']}; {versions}; `{command}`"


def _device() -> str:
    """Returns the accelerator, or the processor and how many cores may be used."""
    if jax.default_backend() != "cpu":
        return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    own = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    name, info = platform.machine(), pathlib.Path("/proc/cpuinfo")
    if info.exists():
        found = [line for line in info.read_text().splitlines() if "model name" in line]
        name = found[0].partition(":")[2].strip() if found else name
    return f"{len(own(0))} cores of {name}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a markdown table, its columns of numbers aligned to the right."""
    columns = zip(*rows, strict=True)
    aligned = ["---:" if _is_numbers(column) else "---" for column in columns]
    lines = [header, aligned or ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _is_numbers(cells: Sequence[str]) -> bool:
    """Whether every cell that is not empty begins with a number."""
    words = [cell.strip("*` ") for cell in cells]
    told = [word for word in words if word.strip("-") and not word.startswith("not ")]
    return bool(told) and all(re.match(r"[-+<>~]?\d", word) for word in told)
