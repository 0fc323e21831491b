"""Each process reads a step on its own; then the processes agree on the outcome.

Reading calls no collectives, so an error on one process leaves no other waiting.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from lorax.checkpoint import digests, entries, record, states, storage
from lorax.checkpoint.folders import RUN, STATE
from lorax.checkpoint.storage import DamagedError
from lorax.training import TrainState

T = TypeVar("T")


def read_payload(folder: epath.Path) -> dict[str, Any]:
    """Returns what `save` sealed in a step's folder; DamagedError if not intact."""
    place = folder / RUN / "metadata"
    try:
        envelope = json.loads(place.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{place} cannot be read: {error}") from error
    payload = record.opened(envelope, str(place))
    try:
        record.require_form(payload)
        for path, entry in payload["adapters"].items():
            _require_entry(path, entry)
    except ValueError as error:
        raise DamagedError(f"{place} is damaged: {error}") from error
    if str(payload["step"]) != folder.name:
        raise DamagedError(f"{place} belongs to step {payload['step']}")
    return payload


def _require_entry(path: str, entry: Any) -> None:
    try:
        entries.skeleton(entry)
    except ValueError as error:
        raise ValueError(f"payload.adapters.{path}: {error}") from error


def read_step(
    folder: epath.Path, template: TrainState, base: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the payload and the verified arrays of a step, by leaf name.

    Args:
      folder: the step's folder.
      template: the expected state.
      base: the expected base, None for any.

    Raises:
      DamagedError: it is not what was written.
      ValueError: it is intact, but belongs to another base or template.
    """
    payload = read_payload(folder)
    stored = payload["leaves"]
    places = states.stored_under(stored, template)
    payload["leaves"] = {name: stored[place] for name, place in places.items()}
    try:
        if base is not None and payload["base"] is not None:
            _check_base(payload["base"], base)
        states.check(payload, template)
    except ValueError as error:
        raise ValueError(f"{folder / RUN / 'metadata'}: {error}") from error
    leaves = states.leaves_of(template)
    there = {place: leaves[name] for name, place in places.items()}
    found = storage.read(folder / STATE, there)
    arrays = {name: found[place] for name, place in places.items()}
    digests.require_intact("", payload["leaves"], arrays)
    return payload, arrays


def _check_base(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    old, new = then["leaves"], now["leaves"]
    if differing := sorted(old.keys() ^ new.keys()):
        where = "checkpoint's base" if differing[0] in old else "params"
        raise ValueError(
            f"{differing[0]}: only the {where} has it; the checkpoint was made on "
            f"another base, from {then['source']}"
        )
    made = f"the checkpoint was made on another base, from {then['source']}"
    digests.require_base(old, new, made)


# Agreement between processes


def of_process_0(steps: list[int]) -> list[int]:
    """Returns, on every process, the steps that process 0 sees."""
    if jax.process_count() == 1:
        return steps
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    mine = np.resize(np.array(steps or [0], np.int32), count)
    return [int(step) for step in multihost_utils.broadcast_one_to_all(mine)]


def agreed(read: Callable[[], T]) -> T:
    """Returns `read()`, or raises on all processes if it raises on any.

    Other errors take precedence over DamagedError, on which every process falls back.
    """
    error: Exception | None = None
    try:
        result = read()
    except Exception as caught:
        error = caught
    code = 0 if error is None else 1 if isinstance(error, DamagedError) else 2
    if jax.process_count() > 1:
        codes = multihost_utils.process_allgather(np.int32(code))
        worst, where = int(np.max(codes)), int(np.argmax(codes))
        if worst > code:
            kind = DamagedError if worst == 1 else RuntimeError
            error = kind(f"process {where} could not restore it; see its log")
    if error is not None:
        raise error
    return result
