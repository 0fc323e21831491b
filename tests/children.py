"""How jax starts for the tests, in their own process and in those that they start."""

import os
import pathlib

ROOT = pathlib.Path(__file__).parent.parent

# Most of what the tests spend is compiling programs that run for milliseconds, so LLVM
# does not optimise them. The passes over HLO, and what they count, are the same.
QUICK = "--xla_backend_optimization_level=0"


def flags(devices):
    """XLA's flags for so many CPU devices."""
    return f"{QUICK} --xla_force_host_platform_device_count={devices}"


def environment(devices=1, **more):
    """The variables for a child process that runs the checkout's lorax on the CPU."""
    start = {
        "XLA_FLAGS": flags(devices),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    return os.environ | start | more
