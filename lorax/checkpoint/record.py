"""The JSON of a checkpoint, sealed with its own digest so that damage is detected.

    {"format": 2, "digest": ..., "payload": {...}}

The digest covers the format and the payload. This envelope never changes: a lorax that
does not know the format can still tell a newer checkpoint from a damaged one. It is
data: reading it runs no code and imports nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np

from lorax import untrusted
from lorax.checkpoint import digests
from lorax.checkpoint.storage import DamagedError

FORMAT = 2  # 1 has other digests and is still read
LIBRARIES = ("lorax-flax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
PAYLOAD = {
    "step": untrusted.whole(),
    "versions": untrusted.mapping(untrusted.TEXT),
    "data": untrusted.ANY,
    "config": untrusted.ANY,
    "metrics": untrusted.mapping(untrusted.FINITE | None),
    "base": untrusted.TABLE | None,
    "adapters": untrusted.TABLE,
    "leaves": untrusted.mapping(untrusted.ANY, 1),
}
"""The rules for the fields of a run's payload."""


def seal(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Returns JSON data in its envelope.

    Example:
      >>> opened(seal({"step": 3}), "here")
      {'step': 3}
    """
    payload = dict(payload)
    return {"format": FORMAT, "digest": digest([FORMAT, payload]), "payload": payload}


def opened(envelope: Any, where: str) -> dict[str, Any]:
    """Returns the payload of an envelope.

    Args:
      envelope: JSON data, as read.
      where: its location, for errors.

    Raises:
      DamagedError: it is not an envelope, or not as it was sealed.
      ValueError: it is intact but in a newer format.
    """
    fields = {"format": int, "digest": str, "payload": dict}
    for field, kind in fields.items():
        if not isinstance(envelope, dict) or type(envelope.get(field)) is not kind:
            raise DamagedError(f"{where} is damaged: it has no valid {field}")
    number, payload = envelope["format"], envelope["payload"]
    if envelope["digest"] != digest([number, payload]):
        raise DamagedError(
            f"{where} is damaged: its digest does not match{_why(payload)}"
        )
    if number > FORMAT:
        raise ValueError(
            f"{where} has format {number}, written with {payload.get('versions')}; "
            f"this lorax reads formats up to {FORMAT}: upgrade lorax"
        )
    return payload


def digest(value: Any) -> str:
    """Returns 32 hex digits: BLAKE2b over JSON data with its keys sorted.

    Example:
      >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1.0})
      True
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _why(payload: Mapping[str, Any]) -> str:
    """The first invalid field, if any; else that the format or the payload changed."""
    try:
        require_form(payload)
    except ValueError as error:
        return f": {error}"
    return " its format and payload"


def require_form(payload: Mapping[str, Any]) -> None:
    """Raises ValueError naming the first field of a run's payload that is invalid."""
    for name, rule in PAYLOAD.items():
        untrusted.field(payload, name, rule, "payload")
    for name, entry in payload["leaves"].items():
        digests.require_form(entry, f"payload.leaves.{name}")
    if payload["base"] is None:
        return
    where = "payload.base"
    untrusted.field(payload["base"], "source", untrusted.TEXT | None, where)
    base = untrusted.field(payload["base"], "leaves", untrusted.TABLE, where)
    for path, entry in base.items():
        digests.require_form(entry, f"{where}.leaves.{path}", abstract=True)


def plain(where: str, value: Any) -> Any:
    """Returns JSON data: tuples become lists, NumPy and JAX scalars Python numbers.

    Args:
      where: what the value is, for errors.
      value: dicts with string keys, lists, tuples, str, int, finite float, bool, None.

    Raises:
      TypeError: JSON cannot represent it, or would not return the same value.

    Example:
      >>> plain("data", {"epoch": np.int64(2), "order": (0, 1)})
      {'epoch': 2, 'order': [0, 1]}
    """
    if isinstance(value, np.generic | np.ndarray | jax.Array) and value.ndim == 0:
        value = value.item()
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: plain(f"{where}.{key}", item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(f"{where}[{i}]", item) for i, item in enumerate(value)]
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    raise TypeError(
        f"{where} is {value!r}; a checkpoint holds JSON data: dicts with string keys, "
        "lists, str, int, finite float, bool and None. Convert it to these, or save a "
        "large array to a file of its own"
    )


def versions() -> dict[str, str]:
    """Returns the versions of the libraries that determine a checkpoint's content."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "(not installed)"
    return found
