r"""Runs a command as several cooperating processes on this machine, for tests.

    python -m experiments.launch_local --processes=2 --devices-per-process=4 -- \
        lorax run --config=gpt2_e2e_lora:runlocal \
        --config.sharding.data=-1

Every process gets that many CPU devices. Output is prefixed with the process; when one
fails, the others are stopped too, and its exit code is returned.
"""

import sys
from collections.abc import Sequence

from absl import app, flags

from experiments.machine import launching

_PROCESSES = flags.DEFINE_integer("processes", 2, "Number of processes.", lower_bound=1)
_DEVICES = flags.DEFINE_integer("devices-per-process", 4, "CPU devices for each.")
_GRACE = flags.DEFINE_float("grace", 10.0, "Seconds between SIGTERM and SIGKILL.")


def main(argv: Sequence[str]) -> None:
    """Launches what follows `--`."""
    if len(argv) < 2:
        raise app.UsageError("no command: give it after --")
    sys.exit(launching.launch(argv[1:], _PROCESSES.value, _DEVICES.value, _GRACE.value))


if __name__ == "__main__":
    app.run(main)
