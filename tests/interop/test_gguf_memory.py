"""Reading a GGUF file takes little more memory than its contents."""

import subprocess
import sys

import numpy as np
import pytest

from lorax.interop.gguf.blocks import Type
from tests import children
from tests.interop import gguf_files as made

SIZES = {
    "embedding_length": 2048,
    "block_count": 9,
    "feed_forward_length": 5504,
    "attention.head_count": 16,
    "attention.head_count_kv": 16,
}

CHILD = """
import sys
import jax, numpy
from lorax.interop import gguf
def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(l for l in lines if l.startswith(field)).split()[1])
jax.block_until_ready(jax.numpy.zeros(3))
before = status("VmRSS")
model, params = gguf.load(sys.argv[1], quantize=sys.argv[2] or None)
jax.block_until_ready(params)
size = sum(array.nbytes for array in jax.tree.leaves(params))
print((status("VmHWM") - before) / size, size)
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    held = made.tensors(lambda name: Type.Q4_1, **SIZES)
    path = tmp_path_factory.mktemp("large") / "x.gguf"
    return made.write(path, held, **SIZES)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "most"), [("", 1.3), ("file", 1.5)])
def test_peak_memory_is_the_size_of_the_model(file, form, most):
    """With codes the leaves are smaller; the largest matrix is unpacked at a time."""
    run = subprocess.run(
        [sys.executable, "-c", CHILD, str(file), form],
        capture_output=True,
        text=True,
        env=children.environment(),
        check=True,
    )
    ratio, size = map(float, run.stdout.split())
    print(
        f"{form or 'dense'}: peak / bytes of the parameters = {ratio:.3f} of {size:.3g}"
    )
    assert ratio <= most
    weights = 9 * (4 * 2048**2 + 3 * 2048 * 5504)
    assert np.isclose(size, 4 * weights if not form else weights * 5.25 / 8, rtol=0.05)
