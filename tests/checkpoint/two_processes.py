"""One of two processes: `python -m ... PORT PROCESS FOLDER`. Prints what it sees."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import signal
import sys
import time
import warnings

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.machine import preemption
from lorax import checkpoint
from lorax.checkpoint import DamagedError, RunCheckpoints, reading, storage
from tests.checkpoint.states import base, bits, filled, fresh

DATA = {"position": 128}


def spread(tree, mesh, spec):
    """Spreads the tree over both processes: matrices by `spec`, the rest replicated.

    Scalars stay local to each process, as in a state before its first step.
    """

    def place(leaf):
        here = NamedSharding(mesh, spec if leaf.ndim == 2 else P())
        if leaf.ndim == 0 and not storage.is_key(leaf):
            return leaf
        if not storage.is_key(leaf):
            array = np.asarray(leaf)
            return jax.make_array_from_callback(array.shape, here, array.__getitem__)
        data = np.asarray(jax.random.key_data(leaf))
        data = jax.make_array_from_callback(data.shape, here, data.__getitem__)
        return jax.random.wrap_key_data(data)

    return jax.tree.map(place, tree)


def whole(state):
    """The same state in host memory, gathered."""
    gathered = jax.tree.map(storage.on_host, state)
    return gathered.replace(key=jax.random.wrap_key_data(gathered.key))


def flip_arrays(folder):
    """Flips a bit in every data file of a step."""
    for path in pathlib.Path(folder, "state").rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@contextlib.contextmanager
def gathering_nothing():
    """Fails if an array is gathered from the processes; scalars may be."""
    gather = multihost_utils.process_allgather
    gathered = []

    def counted(array, **kwargs):
        if np.size(array) > 1:  # orbax agrees on scalars
            gathered.append(np.shape(array))
        return gather(array, **kwargs)

    multihost_utils.process_allgather = counted
    yield
    multihost_utils.process_allgather = gather
    assert not gathered, gathered


def restored_step(run, template):
    """The restored step, and whether a warning was given."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        restored = run.restore(template)
    assert bits(whole(restored.state)) == bits(filled(restored.step, restored.step))
    assert restored.data == DATA
    like = zip(jax.tree.leaves(restored.state), jax.tree.leaves(template))
    assert all(leaf.sharding == other.sharding for leaf, other in like)
    told = [str(w.message) for w in caught if "resuming from" in str(w.message)]
    return restored.step, len(told)


def main(port, process, folder):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("x", "y"))
    params = spread(base(), mesh, P("x", "y"))
    adapters = spread(filled(1, 1).adapters, mesh, P("x", "y"))
    with gathering_nothing():
        checkpoint.save_adapters(pathlib.Path(folder, "adapters"), adapters, params)
    folder = pathlib.Path(folder, "run")
    with RunCheckpoints(folder, params) as run:
        assert run.restore(spread(fresh(), mesh, P("x"))) is None
        for step in (3, 6):
            with gathering_nothing():
                run.save(spread(filled(step, step), mesh, P("x", "y")), DATA)
    template = spread(fresh(), mesh, P(None, "x"))
    print("whole", *restored_step(RunCheckpoints(folder, params), template))

    read = reading.read_step  # damage that only one process sees
    if process == 1:

        def damaged(folder, *args):
            if folder.name == "6":
                raise DamagedError("only here")
            return read(folder, *args)

        reading.read_step = damaged
    print("one", *restored_step(RunCheckpoints(folder, params), template))
    reading.read_step = read

    if process == 0:
        flip_arrays(pathlib.Path(folder, "6"))
    multihost_utils.sync_global_devices("damaged")
    with RunCheckpoints(folder, params) as run:
        print("both", *restored_step(run, template))
        with preemption.Preemption() as preempted:
            for step in range(4, 400):
                if step == 8 and process == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.05)
                multihost_utils.sync_global_devices(f"step {step}")  # as a step would
                if preempted.should_stop(step):
                    run.save(spread(filled(step, step), mesh, P("x", "y")), DATA)
                    os.kill(os.getpid(), signal.SIGTERM)  # once more, to both
                    run.wait()
                    break
        print("stopped", step, *run.steps(), flush=True)
    if process == 0:
        shutil.rmtree(pathlib.Path(folder, "damaged-6"))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
