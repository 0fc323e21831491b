"""Runs one command as several cooperating processes on this machine.

Every process gets a number of CPU devices. Output is prefixed with the process; when
one fails, the others are stopped too.
"""

import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Sequence

from experiments.machine import distributed

_THREADS = 4
"""Threads in XLA's pool for each device. With only one, devices that reach collectives
of different axes in different orders deadlock."""


def environment(process: int, processes: int, devices: int, port: int) -> dict:
    """Returns the environment variables of one process."""
    rest = re.sub(
        r"--xla_force_host_platform_device_count=\d+",
        "",
        os.environ.get("XLA_FLAGS", ""),
    )
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "NPROC": str(_THREADS * devices),
        "XLA_FLAGS": f"{rest} --xla_force_host_platform_device_count={devices}".strip(),
        distributed.COORDINATOR: f"localhost:{port}",
        distributed.COUNT: str(processes),
        distributed.NUMBER: str(process),
    }


def free_port() -> int:
    """Returns a free port."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def launch(
    command: Sequence[str], processes: int, devices: int, grace: float = 10.0
) -> int:
    """Runs the command in every process; returns the first non-zero exit code, or 0.

    Args:
      command: program and arguments.
      processes: number of processes.
      devices: CPU devices of each process.
      grace: seconds between SIGTERM and SIGKILL for the others.
    """
    port = free_port()
    running = [
        subprocess.Popen(
            command,
            env=environment(i, processes, devices, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]
    readers = [
        threading.Thread(target=_echo, args=(i, process), daemon=True)
        for i, process in enumerate(running)
    ]
    for reader in readers:
        reader.start()
    try:
        while True:
            codes = [process.poll() for process in running]
            bad = [code for code in codes if code]
            if bad or None not in codes:
                return bad[0] if bad else 0
            time.sleep(0.1)
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
        for process in running:
            try:
                process.wait(grace)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for reader, process in zip(readers, running, strict=True):
            reader.join()
            process.stdout and process.stdout.close()


def _echo(number: int, process: subprocess.Popen) -> None:
    for line in process.stdout or ():
        print(f"[{number}] {line}", end="", flush=True)
