"""Checkpoints: adapters to share, and the complete state of a run to resume from."""

from lorax.checkpoint.adapters import load_adapters, load_frozen, save_adapters
from lorax.checkpoint.runs import CheckpointWarning, Restored, RunCheckpoints
from lorax.checkpoint.storage import DamagedError

__all__ = [
    "CheckpointWarning",
    "DamagedError",
    "Restored",
    "RunCheckpoints",
    "load_adapters",
    "load_frozen",
    "save_adapters",
]
