"""The GPU benchmark's figures as markdown."""

from collections.abc import Mapping
from typing import Any

from experiments.machine import tables

GIB = 2**30


def steps(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a row per train step; the last column compares with compiled PEFT."""
    header = ["train step", "first call s", "best ms", "range ms", "tokens/s", "MFU"]
    header += ["memory GiB", "speed / PEFT compiled"]
    lines = []
    for name, row in sorted(rows.items(), key=lambda item: "lorax" not in item[0]):
        if "not_run" in row:
            lines.append([f"{name}: not run, {_reason(row)}", *["-"] * 7])
            continue
        ms = [1e3 * s for s in row["seconds"]]
        line = [name, f"{row['build_seconds']:.0f}", f"{min(ms):.1f}"]
        line += [f"{min(ms):.1f}-{max(ms):.1f}", f"{row['tokens_per_second']:,.0f}"]
        line += [f"{100 * row['mfu']:.1f} %" if "mfu" in row else "-"]
        line += [f"{_memory(row) / GIB:.1f}", _speed(row, rows)]
        lines.append(line)
    return tables.markdown(header, lines)


def agreement(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Says how far the losses of lorax and PEFT differ, by method."""
    parts = []
    for method in ("lora", "dora", "adalora", "full"):
        ours = rows.get(f"lorax, {method}", {}).get("losses")
        theirs = _rivals(method, rows)
        if ours is None or not theirs:
            continue
        count = 1 if method == "adalora" else None  # PEFT's includes the penalty
        penalty = rows[f"lorax, {method}"]["penalty"]
        off = max(
            abs(own + penalty - other) / other
            for row in theirs
            for own, other in list(zip(ours, row["losses"], strict=False))[:count]
        )
        parts.append(f"{method} {off:.0e}")
    found = ", ".join(parts)
    return f"Largest relative difference of losses (AdaLoRA: first step): {found}."


def decoding(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a row per way of decoding."""
    header = ["decoding", "first call s", "best s", "tokens/s"]
    lines = []
    for name, row in rows.items():
        if "not_run" in row:
            lines.append([f"{name}: not run, {_reason(row)}", *["-"] * 3])
            continue
        line = [name, f"{row['build_seconds']:.0f}", f"{min(row['seconds']):.2f}"]
        lines.append([*line, f"{row['tokens_per_second']:,.0f}"])
    return tables.markdown(header, lines)


def tests(suite: Mapping[str, Any]) -> str:
    """Returns one sentence, and the names of failed tests."""
    failed = [*suite["FAILED"], *suite["ERROR"]]
    told = f"Tests on the GPU: {suite['PASSED']} passed, {suite['SKIPPED']} skipped, "
    told += f"{len(failed)} failed"
    told += "" if suite["ended"] else "; stopped by the time limit before the last"
    return told + "".join(f"\n- {name}" for name in failed)


def render(result: Mapping[str, Any]) -> str:
    """Returns everything in the JSON as markdown."""
    parts = []
    if rows := result.get("steps"):
        parts += [steps(rows), agreement(rows)]
    if rows := result.get("decoding"):
        parts.append(decoding(rows))
    if suite := result.get("tests", {}).get("suite"):
        parts.append(tests(suite))
    return "\n\n".join([*parts, *([result["note"]] if "note" in result else [])])


def _memory(row: Mapping[str, Any]) -> float:
    """Returns torch's peak, or arguments and temporaries as XLA counts them."""
    if "peak_bytes" in row:
        return row["peak_bytes"]
    return row["argument_bytes"] + row["temporary_bytes"]


def _rivals(method: str, rows: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    return [
        row
        for name, row in rows.items()
        if row.get("method") == method and not name.startswith("lorax")
    ]


def _speed(row: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> str:
    compiled = [
        other["tokens_per_second"]
        for name, other in rows.items()
        if name.endswith("compiled") and other.get("method") == row["method"]
    ]
    return f"{row['tokens_per_second'] / compiled[0]:.2f}" if compiled else "-"


def _reason(row: Mapping[str, Any]) -> str:
    first = row["not_run"].split("\n")[0].split(". ")[0]
    return first.replace("|", "/")[:120]
