"""The state of a run on disk, to resume from: orbax's `CheckpointManager` and digests.

    folder/1200/state/   orbax: every leaf of the TrainState, {name: array}
    folder/1200/run/     JSON, sealed (`record`): step, data position, config, metrics,
                         the base by path and content, adapters with their static
                         fields, and shape, dtype and content of every leaf
    folder/damaged-1100  set aside when a run resumed from an older step

Orbax writes a step to a temporary folder and renames it when complete, but verifies no
bytes when it reads arrays. So every leaf is checked against its entry before the state
is used, and if a step is damaged, the one before it is used instead.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from lorax.checkpoint import digests, folders, reading, record, states, storage
from lorax.checkpoint.storage import DamagedError
from lorax.training import TrainState
from lorax.types import PyTree


class CheckpointWarning(UserWarning):
    """A step on disk is damaged, and an older one is used instead."""


class Restored(NamedTuple):
    """What `RunCheckpoints.restore` returns.

    Attributes:
      state: on the template's shardings.
      step: the number it was saved under.
      data: the data position, as given to `save`.
      config: as given to the `RunCheckpoints` that saved it.
      metrics: as given to `save`, with None for values that were not finite.
    """

    state: TrainState
    step: int
    data: Any
    config: Any
    metrics: dict[str, float | None]


class RunCheckpoints:
    """Saves the complete state of a run, and restores it bit for bit or not at all.

    Every process of a run creates one and calls the same methods in the same order.

    Args:
      folder: a directory used for nothing else, local or anything orbax writes to;
        created at the first save.
      params: the frozen base, after `lorax.init`. Only checksums of its content (and
        of a `Base`'s frozen arrays) are kept, computed shard by shard; the base itself
        is never written. None skips checking the base.
      source: where to get the base again (a path, a hub id); informational.
      config: JSON data; tuples become lists.
      keep: how many of the newest steps to keep (3, so that two may be damaged).
      best: a metric's name; the best step by it is kept too. None for none.
      mode: whether the smallest or the largest metric is best.

    Raises:
      ValueError: the folder holds something else, or `keep` is below 1.
      TypeError: `config` is not JSON data.

    Example:
      >>> import tempfile, optax
      >>> from lorax import training
      >>> from lorax.adapters import Full
      >>> adapters = {"bias": Full(jax.numpy.zeros(3))}
      >>> fresh = training.create_state(jax.random.key(0), adapters, optax.adam(0.1))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with RunCheckpoints(folder, config={"seed": 0}) as checkpoints:
      ...         start = checkpoints.restore(fresh)      # None: nothing there yet
      ...         saved = checkpoints.save(fresh, data={"position": 128})
      ...     with RunCheckpoints(folder) as checkpoints:
      ...         restored = checkpoints.restore(fresh)
      >>> start, saved, restored.data, restored.config
      (None, True, {'position': 128}, {'seed': 0})
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        params: PyTree = None,
        *,
        source: str | None = None,
        config: Any = None,
        keep: int = 3,
        best: str | None = None,
        mode: Literal["min", "max"] = "min",
    ) -> None:
        """Checks the folder and computes the base's checksums; writes nothing."""
        self.folder = storage.folder_of(folder)
        folders.require_ours(self.folder)
        self._config = record.plain("config", config)
        self._base = None
        if params is not None:
            self._base = {"source": source, "leaves": digests.describe_base(params)}
        self._policy = folders.KeepLastAndBest(keep, best, mode)
        self._manager: ocp.CheckpointManager | None = None
        self._not_finite: states.Masks | None = None  # of the previous state
        self._course: set[int] = set()  # steps that this run saved or restored
        self._damaged: set[int] = set()
        self._pending: int | None = None

    def __enter__(self) -> RunCheckpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Returns the complete steps on disk, damaged ones included, in order."""
        return folders.steps_in(self.folder)

    def save(
        self,
        state: TrainState,
        data: Any = None,
        metrics: Mapping[str, float] | None = None,
    ) -> bool:
        """Saves the state as step `state.step`, writing in the background.

        The arrays are copied before it returns, so the state may be donated. Waits for
        the previous save to finish.

        Args:
          state: the state; its leaves may be sharded in any way.
          data: the data position, any JSON data, the same on every process.
          metrics: for `best`, the same on every process.

        Returns:
          False if this run has already saved or restored this very step.

        Raises:
          ValueError: the folder holds this step or a later one from another run; or a
            value is NaN or infinite that was finite in the previous state (such states
            would in time replace every good one).
          TypeError: `data` is not JSON data, or a metric is not a number.
          OSError: this save, or the one before it, could not be written (no space
            left, no permission); older steps are intact.
        """
        payload = {
            "versions": record.versions(),
            "data": record.plain("data", data),
            "config": self._config,
            "metrics": _finite(metrics or {}),
            "base": self._base,
        }
        self.wait()
        step = int(np.max(storage.on_host(state.step)))
        if step in self._course:
            return False
        self._set_aside()
        self._require_latest(step)
        leaves = states.leaves_of(state)
        self._require_finite(step, leaves)
        payload |= {"step": step, **states.describe(state)}
        self._policy.metrics[step] = payload["metrics"]
        args = ocp.args.Composite(
            **{
                folders.STATE: ocp.args.PyTreeSave(storage.to_write(leaves)),
                folders.RUN: ocp.args.JsonSave(record.seal(payload)),
            }
        )
        with self._writing(step):
            self._open().save(step, args=args, force=True)
        self._pending = step
        self._course.add(step)
        return True

    def restore(
        self, template: TrainState, *, step: int | None = None
    ) -> Restored | None:
        """Returns the newest intact state, on the template's shardings.

        Args:
          template: a state of the expected structure, of arrays or abstract; its mesh,
            sharding and number of processes may differ from those of the saved state.
          step: restore exactly this step; None takes the newest, or, with a warning,
            the newest that is intact, the same one on all processes.

        Returns:
          None if nothing has been saved.

        Raises:
          ValueError: the step was saved with another base, rank, class, set of targets
            or optimiser (the error names the difference), or by a newer lorax.
          DamagedError: every step, or the one asked for, is damaged.
          FileNotFoundError: there is no such step.
        """
        self.wait()
        there = reading.of_process_0(self.steps())
        if step is not None and step not in there:
            raise FileNotFoundError(f"{self.folder} has no step {step}; it has {there}")
        problems = {}
        for candidate in [step] if step is not None else there[::-1]:
            try:
                read = functools.partial(
                    reading.read_step, self._at(candidate), template, self._base
                )
                payload, arrays = reading.agreed(read)
            except DamagedError as error:
                problems[candidate] = f"step {candidate}: {error}"
                continue
            for problem in problems.values():
                text = f"{problem}; resuming from step {candidate} of {self.folder}"
                warnings.warn(text, CheckpointWarning, stacklevel=2)
            self._damaged = set(problems)
            self._course = {candidate}
            state = states.place(arrays, template)
            self._not_finite = states.not_finite(states.leaves_of(state))
            fields = (payload[name] for name in ("step", "data", "config", "metrics"))
            return Restored(state, *fields)
        if problems:
            found = "; ".join(problems.values())
            raise DamagedError(f"no step in {self.folder} is intact: {found}")
        return None

    def wait(self) -> None:
        """Returns when the last save is complete; OSError if it failed."""
        if self._manager is not None:
            with self._writing(self._pending):
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save and stops its threads."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    # Writing

    def _at(self, step: int) -> epath.Path:
        return self.folder / str(step)

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            for step in self.steps():
                with contextlib.suppress(ValueError):
                    payload = reading.read_payload(self._at(step))
                    self._policy.metrics[step] = payload["metrics"]
            # Create directories synchronously: when creating them in the background
            # fails (a read-only disk), threads linger that wait for them for 300 s.
            directories = ocp.options.AsyncOptions(
                create_directories_asynchronously=False
            )
            options = ocp.CheckpointManagerOptions(
                async_options=directories,
                preservation_policy=self._policy,
                cleanup_tmp_directories=True,
                lightweight_initialize=True,  # the metadata may be damaged
            )
            self._manager = _Manager(self.folder, options=options)
        return self._manager

    @contextlib.contextmanager
    def _writing(self, step: int | None) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax and tensorstore may raise anything
            self._course.discard(step if step is not None else -1)
            manager, self._manager = self._manager, None
            with contextlib.suppress(Exception):  # the same error once more
                if manager is not None:
                    manager.close()
            before = [other for other in self.steps() if other != step]
            raise OSError(
                f"step {step} could not be written to {self.folder}: "
                f"{storage.reason(error)}. The other steps, {before}, are intact; free "
                "some space or fix the permissions, then resume from them"
            ) from error

    def _require_latest(self, step: int) -> None:
        if (there := self.steps()) and step <= there[-1]:
            raise ValueError(
                f"{self.folder} already holds step {there[-1]} and this is step {step}:"
                " restore from it first, delete the steps from there on, or use "
                "another folder"
            )

    def _require_finite(self, step: int, leaves: Mapping[str, Any]) -> None:
        if problem := states.spoiled(leaves, self._not_finite):
            raise ValueError(
                f"step {step}: {problem}, so it was not saved; the steps in "
                f"{self.folder}, {self.steps()}, are intact. Skip such updates, as "
                "lorax.training.make_train_step does, and resume from the last of "
                "these"
            )
        self._not_finite = states.not_finite(leaves)

    def _set_aside(self) -> None:
        """Moves damaged steps aside, so that they can be saved again."""
        if not self._damaged:
            return
        self.close()  # orbax's manager keeps a list of steps
        if jax.process_index() == 0:
            for step in self._damaged:
                target = self.folder / f"{folders.ASIDE}{step}"
                target.rmtree(missing_ok=True)
                self._at(step).rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("lorax.checkpoint.set_aside")
        self._damaged = set()


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, with preemption checks left to the training loop.

    Orbax's own check runs in a thread that finalises an older step and would disturb
    the loop's agreement on a step; and the time since the last save, which it then
    logs, fails after a lightweight initialisation.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


def _finite(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    values = {name: float(value) for name, value in metrics.items()}
    return {name: v if np.isfinite(v) else None for name, v in values.items()}
