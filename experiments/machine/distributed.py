"""Several processes as one program.

    distributed.initialize(config.distributed)  # before anything asks for devices

Every process runs the same program on the same global arrays (JAX's multi-controller
model), so losses, metrics and generated text are the same everywhere; only the first
process writes.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax

COORDINATOR, COUNT, NUMBER = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
)
"""Environment variables of one process among several on CPU or GPU machines."""


def wanted(config: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> bool:
    """Whether several processes are to run together.

    Args:
      config: `config.distributed`; if its `coordinator` is set, they are.
      environ: they are, too, with `JAX_COORDINATOR_ADDRESS`, a SLURM step of several
        tasks (not just the shell of a job, which also has their number), or a TPU pod's
        list of hosts.
    """
    hosts = environ.get("TPU_WORKER_HOSTNAMES", "")
    tasks = environ.get("SLURM_NTASKS", 1) if "SLURM_STEP_NODELIST" in environ else 1
    return (
        bool(config["coordinator"])
        or COORDINATOR in environ
        or int(tasks) > 1
        or "," in hosts
    )


def initialize(
    config: Mapping[str, Any], environ: Mapping[str, str] = os.environ
) -> None:
    """Joins the processes, if there are several; call it before JAX has devices.

    When a process dies, the others are aborted (SIGABRT, from C++) after its heartbeat
    has been missing for `config["heartbeat"]` seconds; no Python code runs then.

    Args:
      config: `config.distributed`: `coordinator` "host:port", `processes`, `process`,
        `heartbeat` in seconds. Fields that are not set come from the environment.
      environ: see `wanted`.
    """
    if not wanted(config, environ):
        return

    def number(value: int | None, name: str) -> int | None:
        known = value is not None or name not in environ
        return value if known else int(environ[name])

    jax.distributed.initialize(
        config["coordinator"] or environ.get(COORDINATOR),
        number(config["processes"], COUNT),
        number(config["process"], NUMBER),
        heartbeat_timeout_seconds=config["heartbeat"],
    )


def is_primary() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0
