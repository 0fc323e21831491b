"""Reading two gigabytes takes little more than two gigabytes of memory."""

import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from experiments import launch_local
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
from experiments import launch_local
from lorax.interop import hf
rules = sys.argv[3] if len(sys.argv) > 3 else None
model, params = hf.load(sys.argv[1], scan=sys.argv[2] == "scan", quantize=rules)
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
    for key, place in places.items():
        shape = table.disk_shape(flat[place.path].shape, place.entry)
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


@pytest.mark.slow
def test_a_quantised_model_takes_no_dense_one(checkpoint):
    """Two gigabytes, a quarter of a gigabyte of it an embedding, read as NF4."""
    command = [sys.executable, "-c", CHILD, str(checkpoint), "scan", "nf4"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    ratio, size = map(float, run.stdout.split())
    layer, embedding = (
        4 * CONFIG.width * n for n in (CONFIG.hidden, CONFIG.vocabulary)
    )
    peak = ratio * size
    print(f"NF4: {size / 1e6:.0f} MB, peak above import jax {peak / 1e6:.0f} MB")
    assert size < 0.5e9
    assert peak < size + embedding + 8 * layer + 0.2e9  # to compile and to run


SHARDED = """
import sys
import jax
def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(l for l in lines if l.startswith(field)).split()[1])
before = status("VmRSS")
from experiments import distributed
distributed.initialize({"coordinator": "", "processes": None, "process": None,
                        "heartbeat": 100})
from lorax.interop import files, hf
read, fill = [0], files.Tensor._fill
def counted(self, file, array):
    read[0] += array.nbytes
    fill(self, file, array)
files.Tensor._fill = counted
place = distributed.make_place({"fsdp": -1})
lie = lambda model, shapes: place.params(model, shapes).tree(shapes)
model, params = hf.load(sys.argv[1], shardings=lie)
jax.block_until_ready(params)
leaves = jax.tree.leaves(params)
# what a process holds: replicas are read once
parts = lambda leaf: {str(s.index): s.data.nbytes for s in leaf.addressable_shards}
own = sum(sum(parts(leaf).values()) for leaf in leaves)
held = sum(s.data.nbytes for leaf in leaves for s in leaf.addressable_shards)
largest = max(leaf.nbytes for leaf in leaves)
peak = status("VmHWM") - before
print("FOUND", read[0] / own, peak / (1.3 * held + largest), held, flush=True)
"""


@pytest.mark.slow
def test_each_process_reads_and_holds_its_slices(checkpoint, capfd):
    """Two processes with four devices each, every leaf sharded eightfold."""
    command = [sys.executable, "-c", SHARDED, str(checkpoint)]
    assert launch_local.launch(command, 2, 4) == 0
    lines = [
        line.split() for line in capfd.readouterr().out.splitlines() if "FOUND" in line
    ]
    assert len(lines) == 2
    for _, _, read, peak, held in lines:
        print(f"read / own bytes {read}, peak / allowed {peak}, held {held}")
        assert float(held) > 0.9e9
        assert float(read) <= 1.05
        assert float(peak) <= 1
