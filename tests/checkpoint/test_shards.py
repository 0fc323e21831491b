"""Leaves sharded over eight devices are written shard by shard, never gathered."""

from __future__ import annotations

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorax import checkpoint, training
from lorax.adapters import Full
from tests.checkpoint.states import same

SHAPE, SHARD, BYTES = (2048, 256), (512, 128), 2**21


def cut(tree):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    place = lambda x: NamedSharding(mesh, P("x", "y") if x.ndim == 2 else P())
    return jax.tree.map(lambda x: jax.device_put(x, place(x)), tree)


def state():
    kernel = jnp.arange(BYTES // 4, dtype=jnp.float32).reshape(SHAPE)
    tx = optax.sgd(0.1, momentum=0.9)
    return training.create_state(jax.random.key(3), {"w": Full(kernel)}, tx)


def saved_run(folder, state):
    with checkpoint.RunCheckpoints(folder, {"w": state.adapters["w"].value}) as run:
        run.save(state)
    return folder / "0" / "state"


def saved_adapters(folder, state):
    params = {"w": state.adapters["w"].value}
    checkpoint.save_adapters(folder, state.adapters, params)
    return folder / "arrays-0"


def peak_of(save, *args):
    """The most bytes held in host memory at once."""
    tracemalloc.start()
    save(*args)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("save", [saved_run, saved_adapters])
def test_no_leaf_is_gathered(tmp_path, save):
    """One whole leaf in host memory would be BYTES."""
    sharded = cut(state())
    place = save(tmp_path / "first", sharded)  # compiles the checksums
    assert peak_of(save, tmp_path / "second", sharded) < BYTES / 2
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        written = checkpointer.metadata(place).item_metadata.tree
    large = [leaf for leaf in jax.tree.leaves(written) if leaf.shape == SHAPE]
    assert large and all(leaf.storage.write_shape == SHARD for leaf in large)


def test_what_was_cut_may_be_donated_and_comes_back(tmp_path):
    sharded, expected = cut(state()), state()
    with checkpoint.RunCheckpoints(tmp_path) as run:
        run.save(sharded)
        negated = jax.jit(lambda x: jax.tree.map(jnp.negative, x), donate_argnums=0)
        jax.block_until_ready(negated((sharded.adapters, sharded.opt_state)))
        run.wait()
        restored = run.restore(cut(state())).state
    assert same(restored, expected)
    assert restored.adapters["w"].value.addressable_data(0).shape == SHARD


def test_a_shard_that_is_not_finite_is_found(tmp_path):
    bad = state()
    bad.adapters["w"] = Full(bad.adapters["w"].value.at[-1, -1].set(jnp.nan))
    with pytest.raises(ValueError, match="adapters/w/value: 1 of its 524288 values"):
        checkpoint.RunCheckpoints(tmp_path).save(cut(bad))
