"""Reading two gigabytes takes little more memory than two gigabytes."""

import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from lorax.interop import hf
from lorax.models import llama, table

CONFIG = llama.Config(32_000, 4096, 2048, 9, 16, 16, 128, 5504, tied=True, scan=False)

# Not getrusage: its peak is inherited from the parent.
CHILD = """
import sys
import jax
def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(l for l in lines if l.startswith(field)).split()[1])
before = status("VmRSS")
from lorax.interop import hf
model, params = hf.load(sys.argv[1], scan=sys.argv[2] == "scan")
jax.block_until_ready(params)
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print((status("VmHWM") - before) / size, size)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("large")
    (directory / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    shapes = hf.abstract(llama.Model(CONFIG))
    draw, tensors = np.random.default_rng(0), {}
    places = table.locate(llama.entries(CONFIG), CONFIG.stacks, scan=False)
    flat = hf._flat(shapes)
    for key, (path, _, entry) in places.items():
        shape = table.disk_shape(flat[path].shape, entry.inputs, entry.transposed)
        tensors[key] = draw.random(shape, np.float32)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["scan", "layers"])
def test_peak_memory_is_the_size_of_the_model(checkpoint, layout):
    command = [sys.executable, "-c", CHILD, str(checkpoint), layout]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    ratio, size = map(float, run.stdout.split())
    assert size > 2e9
    print(f"{layout}: peak above import jax / bytes of the parameters = {ratio:.3f}")
    assert ratio <= 1.3
