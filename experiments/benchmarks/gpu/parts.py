"""Runs one part of the GPU benchmark; `experiments/benchmarks/gpu.sh` runs all.

    python -m experiments.benchmarks.gpu.parts \
        --gpu_part=lorax --gpu_files=gpu --gpu_out=gpu.json

Every part adds each row to the JSON when it ends, so that one that fails or runs out of
time only costs its own row. "files" comes first: it writes the checkpoint and the
adapters from which the others start.
"""

import fcntl
import functools
import json
import pathlib
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags

from experiments.benchmarks.gpu import ours, sizes, theirs
from experiments.machine import tables

_PART = flags.DEFINE_enum(
    "gpu_part", "lorax", ["files", "lorax", "torch", "decode", "tests"], "What to run."
)
_SIZES = flags.DEFINE_enum("gpu_sizes", "1b", sorted(sizes.SIZES), "How large.")
_FILES = flags.DEFINE_string(
    "gpu_files", None, "Folder of the checkpoint and adapters."
)
_OUT = flags.DEFINE_string("gpu_out", None, "JSON file to which the part adds rows.")
_ROWS = flags.DEFINE_list("gpu_only", [], "Names of rows; empty: all.")

PACKAGES = ("jax", "flax", "optax", "torch", "peft", "transformers")
WORDS = ("PASSED", "SKIPPED", "FAILED", "ERROR")
COMMAND = "experiments/benchmarks/gpu.sh gpu.json"


def timed(
    trainer: ours.Trainer, size: sizes.Sizes, files: pathlib.Path
) -> dict[str, Any]:
    """Makes a few unmeasured steps, then the timed blocks, alone on the GPU.

    Parts may run in parallel, since programs take longer to compile on the CPU than to
    run: a lock in `files` keeps the timed steps apart.
    """
    with open(files / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        losses = trainer.steps(size.steps)
        seconds = []
        for _ in range(size.blocks):
            began = time.perf_counter()
            losses += trainer.steps(size.steps)
            seconds.append((time.perf_counter() - began) / size.steps)
    return {**trainer.facts, "seconds": seconds, "losses": losses}


def told(method: str, row: dict[str, Any], size: sizes.Sizes) -> dict[str, Any]:
    """Adds tokens/s, and MFU: the model's own operations over the peak."""
    best = min(row["seconds"])
    row |= {"method": method, "tokens_per_second": size.tokens / best}
    if top := sizes.peak():
        row["mfu"] = sizes.model_flops(size, method) / best / top
    return row


def lorax_rows(
    size: sizes.Sizes, files: pathlib.Path, only: Sequence[str]
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Returns what to run, by name."""

    def row(name: str) -> dict[str, Any]:
        found = timed(ours.make_trainer(size, files, name), size, files)
        return told(ours.ROWS[name].method, found, size)

    return {f"lorax, {n}": functools.partial(row, n) for n in ours.ROWS if n in only}


def torch_rows(
    size: sizes.Sizes,
    files: pathlib.Path,
    only: Sequence[str],
    compiled: Sequence[bool] = (True, False),
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Returns what to run, by name."""

    def row(method: str, compiled: bool) -> dict[str, Any]:
        theirs.peak_bytes()
        made = theirs.make_trainer(size, files, method, compiled)
        found = timed(made, size, files)
        found["losses"].insert(0, found.pop("first_loss"))
        found["peak_bytes"] = theirs.peak_bytes()
        return told(method, found, size)

    rows: dict[str, Callable[[], dict[str, Any]]] = {}
    for by in compiled:
        for method in (*ours.PEFT, "full"):
            name = f"{'torch' if method == 'full' else 'PEFT'}, {method}"
            if method in only:
                rows[name + ", compiled" * by] = functools.partial(row, method, by)
    return rows


def decode_rows(
    size: sizes.Sizes, files: pathlib.Path, only: Sequence[str]
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Returns what to run, by name."""

    def row(make: Callable[..., Callable[[], Any]], *name: str) -> dict[str, Any]:
        generate = make(size, files, *name)
        seconds = []
        for _ in range(1 + size.blocks):  # the first compiles
            began = time.perf_counter()
            generate()
            seconds.append(time.perf_counter() - began)
        first, *seconds = seconds
        speed = size.batch * size.new / min(seconds)
        return {"build_seconds": first, "seconds": seconds, "tokens_per_second": speed}

    rows: dict[str, Callable[[], dict[str, Any]]] = {
        f"lorax, {name}": functools.partial(row, ours.decoder, name)
        for name in ours.DECODERS
        if name in only
    }
    if "merged" in only:
        rows["PEFT, merged"] = functools.partial(row, theirs.decoder)
    return rows


def tests_row(files: pathlib.Path) -> dict[str, Any]:
    """Reads what `pytest -v -n` printed to `tests.log`, even if it was stopped."""
    text = (files / "tests.log").read_text()
    told = re.findall(r"^\[gw\d+\] \[ *\d+%\] (\w+) (\S.*?) *$", text, re.MULTILINE)
    row: dict[str, Any] = {word: [n for w, n in told if w == word] for word in WORDS}
    row |= {word: len(row[word]) for word in ("PASSED", "SKIPPED")}
    return row | {"ended": bool(re.search(r"\d+ passed.* in [\d.]+s", text))}


def add(path: pathlib.Path, section: str, name: str, value: Any) -> None:
    """Adds an entry to the JSON."""
    facts = tables.about(PACKAGES) | {"command": COMMAND}
    with open(path, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # parts may run in parallel
        file.seek(0)
        result = json.loads(file.read() or "{}")
        result.setdefault("about", facts)
        result.setdefault(section, {})[name] = value
        file.truncate(0)
        file.write(json.dumps(result, indent=1) + "\n")


def main(argv: Sequence[str]) -> None:
    """Runs a part."""
    del argv
    files, out = pathlib.Path(str(_FILES.value)), pathlib.Path(str(_OUT.value))
    size = sizes.SIZES[_SIZES.value]
    if _PART.value == "files":
        ours.write_files(size, files)
        return
    if _PART.value == "tests":
        add(out, "tests", "suite", tests_row(files))
        return
    made = {"lorax": lorax_rows, "torch": torch_rows, "decode": decode_rows}
    section = "decoding" if _PART.value == "decode" else "steps"
    only = _ROWS.value or [*ours.ROWS, *ours.DECODERS]
    for name, run in made[_PART.value](size, files, only).items():
        try:
            row = run()
        except Exception as error:  # of many classes; memory is one
            row = {"not_run": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        add(out, section, name, row)
        shown = {key: value for key, value in row.items() if key != "losses"}
        print(name, json.dumps(shown), flush=True)


if __name__ == "__main__":
    flags.mark_flags_as_required(["gpu_files", "gpu_out"])
    app.run(main)
