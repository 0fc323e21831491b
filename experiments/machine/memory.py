"""How much is held, and what XLA frees on a CPU and asks for again at every step."""

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import sys

import jax

# What `mallopt` sets, by its number in glibc's malloc.h.
_SETTINGS = {
    -8: 1,  # arenas
    -4: 0,  # blocks that are mapped for themselves
    -1: -1,  # free bytes at the top that are handed back: never
    -2: 2**28,  # bytes to ask the kernel for beside those that are needed
}


def peak() -> int:
    """Returns the most bytes held so far: of the fullest device, on a CPU in all."""
    told = [device.memory_stats() or {} for device in jax.local_devices()]
    found = [stats.get("peak_bytes_in_use", 0) for stats in told]
    if any(found):
        return max(found)
    try:
        import resource  # of Unix
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def keep() -> bool:
    """Makes glibc's malloc keep what is freed, for the rest of the process.

    XLA:CPU takes a program's temporaries from malloc at every call. glibc maps large
    ones anew, and the kernel clears their pages: 97,000 page faults a step for the
    model of `experiments.benchmarks.frameworks`, none once they are kept. The process
    then holds on to what it held at its largest. Call it before JAX starts its threads,
    which is when it is first asked for a device.

    Returns:
      False where there is no `mallopt`, as with other libraries than glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(name, value) for name, value in _SETTINGS.items())


def keep_on_cpu() -> bool:
    """`keep` where JAX will compute on the CPU, as far as can be told before it starts.

    Returns:
      True where it was done.
    """
    if chosen := os.environ.get("JAX_PLATFORMS", ""):
        return chosen.startswith("cpu") and keep()
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    accelerated = importlib.util.find_spec("libtpu") or plugins
    return not accelerated and keep()
