"""Malloc keeps what a step frees."""

import os
import subprocess
import sys

import pytest

from experiments.machine import memory
from tests import children

# Transparent 2 MiB pages, if the machine uses them, would hide most of the faults.
FAULTS = """
import ctypes, resource, sys
from experiments.machine import memory
PR_SET_THP_DISABLE = 41  # of Linux's prctl.h
assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
if sys.argv[1] == "keep":
    assert memory.keep()
import numpy as np
count = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(2**23)
before = count()
for _ in range(10):
    np.ones(2**23)  # 64 MiB, 16,384 pages
print(count() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_pages_are_cleared_once():
    def faults(how):
        told = subprocess.check_output(
            [sys.executable, "-c", FAULTS, how], cwd=children.ROOT
        )
        return int(told)

    assert faults("as it is") > 1_000
    assert faults("keep") < 100


@pytest.mark.parametrize(
    "platforms, plugins, expected",
    [
        ("", (), True),
        ("", ("cuda",), False),
        ("cpu", ("cuda",), True),
        ("cuda,cpu", (), False),
    ],
)
def test_on_a_cpu_alone(monkeypatch, platforms, plugins, expected):
    monkeypatch.setattr(memory, "keep", lambda: True)
    monkeypatch.setattr(memory.importlib.metadata, "entry_points", lambda **_: plugins)
    monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(os.environ, "JAX_PLATFORMS", platforms)
    assert memory.keep_on_cpu() is expected
