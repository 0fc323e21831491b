"""A run that goes on after a stop: what it saves of itself, when, and how it leaves.

    with keeping.Keeper(keep, params) as keeper:
        state, start = keeper.restore(state)
        for step in range(start + 1, steps + 1):
            state, metrics = train_step(state, params, batches[step - 1])
            keeper.after(state, step)

Told to stop (SIGTERM), it saves and leaves with `preemption.EXIT_PREEMPTED`; the same
command then goes on from there, bit for bit. What an abort leaves behind (a process of
several that died takes the others with it, and no Python code runs then) is the last
complete save.
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
"""Fields of the config in which a run may differ from the one it goes on with."""


class Keep(NamedTuple):
    """How a run keeps itself.

    Attributes:
      folder: of the checkpoints.
      config: of the run, whole.
    """

    folder: pathlib.Path
    config: ml_collections.ConfigDict


def make_keep(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> Keep | None:
    """Returns how a run keeps itself; None if `config.run.save_every` is 0."""
    return Keep(workdir / "checkpoints", config) if config.run.save_every else None


class Keeper(contextlib.ExitStack):
    """Saves every so often, and when the run is told to stop."""

    def __init__(self, keep: Keep, params: Any) -> None:
        """Opens the folder.

        Args:
          keep: folder and config; of the config `run.save_every` (steps),
            `run.save_keep` (how many) and `run.save_deadline` (seconds that the last
            save may take).
          params: the base, as adapters were initialised on it.
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
        """Returns the newest state that is whole and its step; else `state` and 0.

        Raises:
          ValueError: it is of another run: another base, targets, or config.
        """
        found = self._checkpoints.restore(state)
        if found is None:
            return state, 0
        then, now = _flat(found.config), _flat(self._config)
        for name in sorted(then.keys() | now.keys()):
            if then.get(name) != now.get(name) and not name.startswith(FREE):
                raise ValueError(
                    f"{self._folder} holds a run of {name}={then.get(name)!r}, and "
                    f"this one has {now.get(name)!r}: take another workdir, or delete "
                    "that folder"
                )
        return found.state, int(found.data["batches"])

    def after(self, state: Any, step: int) -> None:
        """To be called after every step, by every process.

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
    """Saves the adapters and asserts that what is read back is what was saved."""
    checkpoint.save_adapters(path, adapters, params, overwrite=True)
    restored = checkpoint.load_adapters(path, params=params)
    same = jax.tree.map(np.array_equal, restored, adapters)  # or it raises
    for name, array in checkpoint.load_frozen(path).items():
        same[name] = np.array_equal(array, tree.split(params)[1][name])
    if not all(jax.tree.leaves(same)):
        raise OSError(f"{path}: the adapters read back are not those saved")


def _flat(config: Any, front: str = "") -> dict[str, Any]:
    """`{"run.steps": ...}`."""
    if not isinstance(config, dict) or not config:
        return {front.rstrip("."): config}
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= _flat(value, f"{front}{name}.")
    return found
