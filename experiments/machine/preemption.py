"""Preemption: a run that is told to stop saves, and exits with a code that says so.

    with preemption.Preemption(deadline=60) as preempted:
        for step in range(start, steps):
            state, metrics = train_step(state, params, batches[step])
            if preempted.should_stop(step + 1):
                with preempted.saving(step + 1):
                    checkpoints.save(state, {"position": step + 1})
                    checkpoints.wait()
                sys.exit(preemption.EXIT_PREEMPTED)

A single process listens for SIGTERM. With several, JAX listens and agrees on one step
at which all of them stop, whichever of them got the signal; a handler of our own would
take the signal away from JAX, so there is none.
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

It is EX_TEMPFAIL of sysexits.h; 143, the shell's code for SIGTERM, means that the run
has not saved.
"""
EXIT_DEADLINE = 74
"""Exit code of a run that could not save in time: EX_IOERR of sysexits.h."""


class Preemption:
    """Listens for SIGTERM inside its `with` block, then restores the previous handler.

    The handler only sets a flag, so a second signal during the save changes nothing.

    Args:
      deadline: seconds that `saving` may take; None for no limit. Keep it below the
        time that the cluster leaves between SIGTERM and SIGKILL (30 s on Kubernetes and
        preemptible VMs; `KillWait` on SLURM, 30 s by default).

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
        """Checks the deadline; the handler is installed on entry."""
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
                    "Preemption must be entered in the main thread: Python does not "
                    "allow signal handlers elsewhere"
                )
            self._previous = signal.signal(signal.SIGTERM, self._tell)
            self._installed = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            # None: the handler was not set from Python, and cannot be restored.
            previous = signal.SIG_DFL if self._previous is None else self._previous
            signal.signal(signal.SIGTERM, previous)
            self._installed = False

    def _tell(self, number: int, frame: FrameType | None) -> None:
        self._told = True

    def should_stop(self, step: int) -> bool:
        """Whether to save and stop now; all processes get True at the same step.

        Args:
          step: steps done; every process calls this after every step.
        """
        if jax.process_count() > 1 and not self._told:
            self._told = bool(multihost_utils.reached_preemption_sync_point(step))
        return self._told

    @contextlib.contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Limits the time of what is inside: at the deadline, the process exits.

        It exits by `os._exit`, because a save that hangs (in a file system, or at a
        barrier) would hang any clean-up too. Earlier checkpoints stay intact: orbax
        renames a step into place only when it is complete.

        Args:
          step: named in the message.
        """
        done = threading.Event()

        def watch() -> None:
            if not done.wait(self.deadline):
                print(
                    f"preempted: step {step} was not saved within {self.deadline:g} s; "
                    "the run will resume from the checkpoint before it",
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
