"""Committed checkpoints: every later lorax and JAX must restore them.

Written by this file, `python -m tests.checkpoint.test_golden_run FOLDER`, under lorax
0.1.0, jax 0.10.2, orbax-checkpoint 0.12.8. A new format gets a folder beside them; none
is ever rewritten.
"""

from __future__ import annotations

import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import pytest

from lorax.checkpoint import RunCheckpoints
from tests.checkpoint.states import base, fresh, same

HERE = pathlib.Path(__file__).parent
DATA = {"position": 1234, "packer": [[7, 8], []]}
CONFIG = {"run": {"seed": 3}, "rate": 0.1, "note": "a µ", "none": None}


def golden():
    """A state from a formula: leaf i counts up from i in quarters."""
    leaves, structure = jax.tree.flatten(fresh())
    for i, leaf in enumerate(leaves[:-1]):
        counted = i + jnp.arange(leaf.size) / 4
        leaves[i] = counted.reshape(leaf.shape).astype(leaf.dtype)
    leaves[-1] = jax.random.key(11)
    state = jax.tree.unflatten(structure, leaves)
    return state.replace(step=jnp.asarray(6, jnp.int32))


def write(folder):
    """Saves it; tests call this only on a scratch folder."""
    with RunCheckpoints(folder, base(), source="base", config=CONFIG) as run:
        run.save(golden(), DATA, {"loss": 0.5})


def check(folder):
    with RunCheckpoints(folder, base()) as run:
        restored = run.restore(fresh())
    assert same(restored.state, golden())
    assert (restored.step, restored.data, restored.config) == (6, DATA, CONFIG)
    assert restored.metrics == {"loss": 0.5}


@pytest.mark.parametrize("folder", ["golden_format_1", "golden_format_2"])
def test_the_committed_checkpoint_is_restored(tmp_path, folder):
    shutil.copytree(HERE / folder, tmp_path / "run")  # the original is left alone
    check(tmp_path / "run")


def test_what_is_written_today_is_restored(tmp_path):
    write(tmp_path / "run")
    check(tmp_path / "run")


if __name__ == "__main__":
    write(sys.argv[1])
