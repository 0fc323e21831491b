"""Non-finite steps: a few may be skipped, then the run stops and says why.

The train step itself leaves the state as it was before such a step (see
`lorax.training.make_train_step`); this module counts them:

    guard = nonfinite.Guard(folder, limit=3)
    guard.start(state.skipped)
    for step in range(start, steps):
        state, metrics = train_step(state, params, batch)
        guard.watch(step, batch, metrics)
    guard.finish()
"""

import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from lorax.checkpoint import storage

LIMIT = 3
"""Steps in a row that may be skipped if the config does not say (the quickstart)."""

UPDATE = ", but the adapters, the optimiser's state or the model's would not be"
GRADIENT_ADVICE = (
    "Lower the learning rate, clip the gradients, or look at what that batch holds"
)
UPDATE_ADVICE = (
    "Check the learning rate and its schedule at that step, the optimiser's epsilon "
    "(with 0, a zero gradient gives 0 / 0, and float16 rounds 1e-8 to 0), the dtype of "
    "the adapters (float32 is safe), and statistics that the model keeps"
)


class NonFiniteError(FloatingPointError):
    """Too many steps in a row were not finite."""


class Guard:
    """Stops a run after more than `limit` steps in a row that were not finite.

    A step is not finite if its loss or gradient norm is not, or if the train step
    skipped it because adapters, optimiser or model state would not have been. A step
    without target tokens is skipped too, and counts as neither. If the train step
    counts what it skipped, only that number is fetched, once the next step has been
    dispatched, so that the device does not wait for the host.

    Args:
      folder: where the batch is written, as `nonfinite-step-17.npz`.
      limit: how many steps in a row may be skipped; 0 stops at the first.

    Raises:
      ValueError: `limit` is negative.

    Example:
      >>> guard = Guard("runs/a", limit=1)
      >>> for step, loss in enumerate([1.0, math.nan, 2.0, math.inf]):
      ...     guard.watch(step, {"x": np.ones(2)}, {"loss": loss})
      >>> guard.finish()
      >>> guard.in_a_row
      1
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int) -> None:
        """Starts with no step seen."""
        if type(limit) is not int or limit < 0:
            raise ValueError(f"limit must be an int of at least 0; got {limit!r}")
        self.folder = pathlib.Path(folder)
        self.limit = limit
        self.in_a_row = 0
        self._skipped = 0.0
        self._waiting: tuple[int, Any, Mapping[str, Any]] | None = None

    def start(self, skipped: int) -> None:
        """Sets how many steps the state has skipped so far, for a resumed run."""
        self._skipped = float(skipped)

    def watch(self, step: int, batch: Any, metrics: Mapping[str, Any]) -> None:
        """Takes a step that was dispatched, and checks the one before it.

        Args:
          step: its number, for the message.
          batch: its batch; kept until the next call, so it must not be donated.
          metrics: what it returned.

        Raises:
          NonFiniteError: on all processes alike, because their metrics are the same.
        """
        previous, self._waiting = self._waiting, (step, batch, metrics)
        if previous is not None:
            self._look(*previous)

    def finish(self) -> None:
        """Checks the last step; raises as `watch` does."""
        previous, self._waiting = self._waiting, None
        if previous is not None:
            self._look(*previous)

    def _look(self, step: int, batch: Any, metrics: Mapping[str, Any]) -> None:
        before = self._skipped
        if "skipped" in metrics:
            self._skipped = float(jax.device_get(metrics["skipped"]))
            if self._skipped == before:  # usually this is all that is fetched
                self.in_a_row = 0
                return
        names = ("loss", "grad_norm", "weight")
        found = jax.device_get({n: metrics[n] for n in names if n in metrics})
        values = {name: float(found[name]) for name in names if name in found}
        if values.pop("weight", None) == 0:
            return
        shown = not all(map(math.isfinite, values.values()))
        bad = shown or self._skipped > before
        self.in_a_row = self.in_a_row + 1 if bad else 0
        if self.in_a_row <= self.limit:
            return
        told = ", ".join(f"{name} {value:g}" for name, value in values.items())
        raise NonFiniteError(
            f"step {step} is not finite ({told}{'' if shown else UPDATE}), the last of "
            f"{self.in_a_row} in a row where {self.limit} may be skipped; adapters and "
            f"optimiser are as before them. {self._keep(step, batch)} "
            f"{GRADIENT_ADVICE if shown else UPDATE_ADVICE}"
        )

    def _keep(self, step: int, batch: Any) -> str:
        part = f"-process-{jax.process_index()}" if jax.process_count() > 1 else ""
        path = self.folder / f"nonfinite-step-{step}{part}.npz"
        try:
            save_batch(path, batch)
        except OSError as error:  # the message must still name the step
            return f"Its batch could not be written to {path}: {error}."
        return f"Its batch is in {path}, for numpy.load."


def save_batch(path: pathlib.Path, batch: Any) -> None:
    """Writes a tree of arrays as `npz`, which loads with `allow_pickle=False`.

    Args:
      path: the file; its folder is created.
      batch: any tree; the leaf `x` of a dict is called `batch/x`. Small floats and
        integers that numpy lacks (bfloat16, int4) are widened, which is exact; a PRNG
        key is written as its data, an object as its `str`. Arrays sharded over
        processes are gathered, so all processes must call this.
    """
    arrays: dict[str, Any] = {}
    for key_path, leaf in jtu.tree_flatten_with_path(batch)[0]:
        array = storage.on_host(leaf)
        if array.dtype.kind == "V":
            floating = jnp.issubdtype(array.dtype, jnp.floating)
            array = array.astype(np.float32 if floating else np.int32)
        if array.dtype.hasobject:  # it would be pickled
            array = array.astype(str)
        name = jtu.keystr(key_path, simple=True, separator="/")
        arrays[f"batch/{name}" if name else "batch"] = array
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
