"""A run that is told to go: it saves, says so by its exit code, and starts again.

    with preemption.Preemption(deadline=60) as preempted:
        for step in range(start, steps):
            state, metrics = train_step(state, params, batches[step])
            if preempted.should_stop(step + 1):
                with preempted.saving(step + 1):
                    checkpoints.save(state, {"position": step + 1})
                    checkpoints.wait()
                sys.exit(preemption.EXIT_PREEMPTED)

A process on its own listens for SIGTERM. Among several JAX listens, and agrees on one
step at which all of them stop, whichever of them was told; our own handler would take
the signal from it, so there is none.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

EXIT_PREEMPTED = 75
"""Exit code of a run that was told to stop and has saved: start it again.

EX_TEMPFAIL of sysexits.h; 143, the shell's code for SIGTERM, is a run that has not.
"""
EXIT_DEADLINE = 74
"""Exit code of a run whose save took longer than it had: EX_IOERR of sysexits.h."""


class Preemption:
    """Listens for SIGTERM inside its `with` block; the handler before it comes back.

    The handler only sets a flag, so a second signal during the save changes nothing.

    Args:
      deadline: seconds that `saving` may take; None for any. Keep it below what the
        cluster leaves between SIGTERM and SIGKILL (30 s on Kubernetes and on
        preemptible VMs, `KillWait` on SLURM, 30 s there by default).

    Raises:
      ValueError: the deadline is not positive.

    Example:
      >>> with Preemption() as preempted:
      ...     before = preempted.should_stop(1)
      ...     signal.raise_signal(signal.SIGTERM)
      ...     before, preempted.should_stop(2), preempted.should_stop(3)
      (False, True, True)
    """

    def __init__(self, deadline: float | None = 25.0) -> None:
        """Installs nothing yet."""
        if deadline is not None and not deadline > 0:
            raise ValueError(f"deadline must be positive, or None; got {deadline!r}")
        self.deadline = deadline
        self._told = False
        self._previous: Any = None
        self._installed = False

    def __enter__(self) -> "Preemption":
        if jax.process_count() == 1:
            if threading.current_thread() is not threading.main_thread():
                raise RuntimeError(
                    "Preemption must be entered in the main thread: Python allows "
                    "signal handlers nowhere else"
                )
            self._previous = signal.signal(signal.SIGTERM, self._tell)
            self._installed = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            # None: a handler that was not set from Python, and cannot be set again.
            previous = signal.SIG_DFL if self._previous is None else self._previous
            signal.signal(signal.SIGTERM, previous)
            self._installed = False

    def _tell(self, number: int, frame: FrameType | None) -> None:
        self._told = True

    def should_stop(self, step: int) -> bool:
        """True from the step on at which to save and stop, the same on all processes.

        Args:
          step: steps done; each call with the next one, on every process.
        """
        if jax.process_count() > 1 and not self._told:
            self._told = bool(multihost_utils.reached_preemption_sync_point(step))
        return self._told

    @contextlib.contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Bounds the time of what is inside: past the deadline the process is gone.

        It leaves by `os._exit`, for a save that hangs (a file system, a barrier of
        processes) would hang any clean-up too. The steps before are whole: orbax
        renames a step into place when it is complete.

        Args:
          step: named in the message.
        """
        done = threading.Event()

        def watch() -> None:
            if not done.wait(self.deadline):
                print(
                    f"preempted: step {step} was not saved within {self.deadline:g} s; "
                    "going on later from the step before it",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(EXIT_DEADLINE)

        thread = threading.Thread(target=watch, daemon=True, name="save-deadline")
        if self.deadline is not None:
            thread.start()
        try:
            yield
        finally:
            done.set()
