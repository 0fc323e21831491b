"""Resumable runs: what a run saves of itself, when, and how it exits.

    with keeping.Keeper(keep, params) as keeper:
        state, start = keeper.restore(state)
        for step in range(start + 1, steps + 1):
            state, metrics = train_step(state, params, batches[step - 1])
            keeper.after(state, step)

On SIGTERM the run saves and exits with `preemption.EXIT_PREEMPTED`; the same command
then resumes from there, bit for bit. After an abort (when one of several processes
dies, it takes the others with it, and no Python code runs then) the last complete save
remains.
"""

import contextlib
import json
import pathlib
from typing import Any, NamedTuple, Self

import jax
import ml_collections
import numpy as np

from experiments.machine import preemption
from lorax import checkpoint, tree

FREE = (
    *("distributed.", "sharding.", "eval."),
    *("run.name", "run.log_every", "run.save_", "run.skip_nonfinite"),
)
"""Fields of the config in which a run may differ from the one that it resumes."""


class Keep(NamedTuple):
    """Where and how a run saves itself.

    Attributes:
      folder: of the checkpoints.
      config: the whole config of the run.
    """

    folder: pathlib.Path
    config: ml_collections.ConfigDict


def make_keep(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> Keep | None:
    """Returns how a run saves itself; None if `config.run.save_every` is 0."""
    return Keep(workdir / "checkpoints", config) if config.run.save_every else None


class Keeper(contextlib.ExitStack):
    """Saves every `run.save_every` steps, and when the run is told to stop."""

    def __init__(self, keep: Keep, params: Any) -> None:
        """Opens the folder.

        Args:
          keep: folder and config; it reads `run.save_every` (steps), `run.save_keep`
            (how many) and `run.save_deadline` (seconds that the last save may take).
          params: the base on which the adapters were initialised.
        """
        super().__init__()
        self._run, self._folder = keep.config.run, keep.folder
        self._config = json.loads(keep.config.to_json_best_effort())
        self._checkpoints = checkpoint.RunCheckpoints(
            keep.folder,
            params,
            source=keep.config.model.source,
            config=self._config,
            keep=self._run.save_keep,
        )
        self._preempted = preemption.Preemption(self._run.save_deadline)

    def __enter__(self) -> Self:
        """Listens for SIGTERM from here on."""
        super().__enter__()
        self.enter_context(self._checkpoints)
        self.enter_context(self._preempted)
        return self

    def restore(self, state: Any) -> tuple[Any, int]:
        """Returns the newest complete state and its step; else `state` and 0.

        Raises:
          ValueError: the checkpoint is of another run, with another base, targets or
            config.
        """
        found = self._checkpoints.restore(state)
        if found is None:
            return state, 0
        then, now = _flat(found.config), _flat(self._config)
        for name in sorted(then.keys() | now.keys()):
            if then.get(name) != now.get(name) and not name.startswith(FREE):
                raise ValueError(
                    f"{self._folder} holds a run with {name}={then.get(name)!r}, but "
                    f"this one has {now.get(name)!r}: use another workdir, or delete "
                    "that folder"
                )
        return found.state, int(found.data["batches"])

    def after(self, state: Any, step: int) -> None:
        """Saves if a save is due; every process calls it after every step.

        Raises:
          SystemExit: the run was told to stop, and has saved.
        """
        data = {"batches": step}
        if self._preempted.should_stop(step):
            with self._preempted.saving(step):
                self._checkpoints.save(state, data)
                self._checkpoints.wait()
            raise SystemExit(preemption.EXIT_PREEMPTED)
        if step % self._run.save_every == 0 or step == self._run.steps:
            self._checkpoints.save(state, data)


def save_and_verify(path: pathlib.Path, adapters: Any, params: Any) -> None:
    """Saves the adapters, and checks that they read back as they were saved."""
    checkpoint.save_adapters(path, adapters, params, overwrite=True)
    restored = checkpoint.load_adapters(path, params=params)
    same = jax.tree.map(np.array_equal, restored, adapters)  # or it raises
    for name, array in checkpoint.load_frozen(path).items():
        same[name] = np.array_equal(array, tree.split(params)[1][name])
    if not all(jax.tree.leaves(same)):
        raise OSError(f"{path}: the adapters read back differ from those saved")


def _flat(config: Any, front: str = "") -> dict[str, Any]:
    """Flattens a nested config to `{"run.steps": ...}`."""
    if not isinstance(config, dict) or not config:
        return {front.rstrip("."): config}
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= _flat(value, f"{front}{name}.")
    return found
