"""How jax starts for the tests, in their own process and in those that they start."""

import importlib.metadata
import os
import pathlib

ROOT = pathlib.Path(__file__).parent.parent

# Most of what the tests spend is compiling programs that run for milliseconds, so LLVM
# does not optimise them, and gets each in one piece. The passes over HLO, and what they
# count, are the same.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
# XLA's older emitters of loops compile twice as fast; later versions refuse the flag.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    QUICK += " --xla_cpu_use_fusion_emitters=false"


def flags(devices):
    """XLA's flags for so many CPU devices."""
    return f"{QUICK} --xla_force_host_platform_device_count={devices}"


def threads(devices):
    """Threads of XLA's pool, as `NPROC` says it.

    A collective holds a thread on every device until all have come. By default there
    are as many threads as devices, so devices that come to collectives of different
    axes in a different order can wait for each other for ever.
    """
    return str(4 * devices)


def environment(devices=1, **more):
    """The variables for a child process that runs the checkout's lorax on the CPU."""
    start = {
        "XLA_FLAGS": flags(devices),
        "NPROC": threads(devices),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    return os.environ | start | more
