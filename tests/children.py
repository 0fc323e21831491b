"""How JAX is configured for the tests, in their own process and in child processes."""

import importlib.metadata
import os
import pathlib

ROOT = pathlib.Path(__file__).parent.parent

# The tests mostly compile programs that run for milliseconds, so LLVM does not optimise
# them, and gets each in one piece. The HLO passes, and what they count, are unchanged.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
# XLA's older emitters of loops compile twice as fast; later versions refuse the flag.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    QUICK += " --xla_cpu_use_fusion_emitters=false"


def flags(devices):
    """XLA's flags for this many CPU devices."""
    return f"{QUICK} --xla_force_host_platform_device_count={devices}"


def threads(devices):
    """The number of threads in XLA's pool, for `NPROC`.

    A collective holds a thread on every device until all have arrived. By default there
    are as many threads as devices, so devices that reach collectives over different
    axes in different orders can wait for each other for ever.
    """
    return str(4 * devices)


def environment(devices=1, **more):
    """Environment of a child process that runs this checkout's lorax on the CPU."""
    start = {
        "XLA_FLAGS": flags(devices),
        "NPROC": threads(devices),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    return os.environ | start | more
