"""Peak memory, and keeping on a CPU what XLA frees and allocates again every step."""

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import sys

import jax

# Settings of `mallopt`, by their numbers in glibc's malloc.h.
_SETTINGS = {
    -8: 1,  # arenas
    -4: 0,  # blocks that are mapped separately
    -1: -1,  # free bytes at the top above which memory is returned: never
    -2: 2**28,  # extra bytes to ask the kernel for
}


def peak() -> int:
    """Returns the peak bytes in use: of the fullest device, or on a CPU the process."""
    told = [device.memory_stats() or {} for device in jax.local_devices()]
    found = [stats.get("peak_bytes_in_use", 0) for stats in told]
    if any(found):
        return max(found)
    try:
        import resource  # Unix only
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def keep() -> bool:
    """Makes glibc's malloc keep freed memory, for the rest of the process.

    XLA:CPU allocates a program's temporaries with malloc at every call. glibc maps
    large ones anew each time, and the kernel clears their pages: 97,000 page faults per
    step for the model of `experiments.benchmarks.frameworks`, and none once they are
    kept. The process then never shrinks below its peak. Call this before JAX starts its
    threads, which it does when it is first asked for a device.

    Returns:
      False if there is no `mallopt`, because the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(name, value) for name, value in _SETTINGS.items())


def keep_on_cpu() -> bool:
    """Calls `keep` if JAX seems about to compute on the CPU, judged before it starts.

    Returns:
      Whether memory is kept.
    """
    if chosen := os.environ.get("JAX_PLATFORMS", ""):
        return chosen.startswith("cpu") and keep()
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    accelerated = importlib.util.find_spec("libtpu") or plugins
    return not accelerated and keep()
