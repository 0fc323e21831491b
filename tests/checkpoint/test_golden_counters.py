"""A checkpoint in which optimisers call their counter `step` is restored as `count`.

Written by this file, `python -m tests.checkpoint.test_golden_counters FOLDER`, under
the last lorax with the old name, jax 0.10.2, orbax-checkpoint 0.12.8; never again.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorax import optim
from lorax.checkpoint import RunCheckpoints
from tests.checkpoint.states import base, fresh, same

FOLDER = pathlib.Path(__file__).parent / "golden_counters"
SCHEDULE = optax.constant_schedule(2.0)
COUNTERS = 6
"""Optimiser counters: those of the five, and that of `scale_by_adam`."""


def started(*links):
    """The structure of a state with these transformations."""
    return jax.eval_shape(lambda: fresh(tx=optax.chain(*links)))


def template():
    """Every transformation that called its counter `step`, and Adam."""
    return started(
        optim.scale_by_lora_rite(),
        optim.scale_by_lora_pro_rowcol(),
        optim.scale_by_lora_pro_full(),
        optax.scale_by_adam(),
        optim.scale_by_lora_plus(SCHEDULE),
        optim.split_decay(0.1, SCHEDULE),
    )


def golden():
    """A state from a formula: leaf i counts up from i in quarters."""
    leaves, structure = jax.tree.flatten(template())
    for i, leaf in enumerate(leaves[:-1]):
        counted = i + np.arange(leaf.size) / 4
        leaves[i] = jnp.asarray(counted.reshape(leaf.shape).astype(leaf.dtype))
    leaves[-1] = jax.random.key(11)
    state = jax.tree.unflatten(structure, leaves)
    return state.replace(step=jnp.asarray(6, jnp.int32))


def names(folder):
    """The leaves that a checkpoint's record lists."""
    record = json.loads((folder / "6" / "run" / "metadata").read_text())
    return set(record["payload"]["leaves"])


def test_a_checkpoint_with_the_old_names_is_restored():
    counters = {name for name in names(FOLDER) if name.startswith("opt_state/")}
    assert sum(name.endswith("/step") for name in counters) == COUNTERS - 1
    with RunCheckpoints(FOLDER, base()) as run:
        assert same(run.restore(template()).state, golden())


def test_it_is_saved_again_under_the_names_of_today(tmp_path):
    with RunCheckpoints(tmp_path / "run", base()) as run:
        run.save(golden())
        run.wait()
        assert same(run.restore(template()).state, golden())
    written = {n for n in names(tmp_path / "run") if n.startswith("opt_state/")}
    assert sum(name.endswith("/count") for name in written) == COUNTERS
    assert not any(name.endswith("/step") for name in written)


def test_another_optimiser_is_still_named(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "run")
    plain = started(optax.scale_by_adam())
    with RunCheckpoints(tmp_path / "run", base()) as run:
        with pytest.raises(ValueError, match="only the (checkpoint|template) has it"):
            run.restore(plain)


if __name__ == "__main__":
    with RunCheckpoints(sys.argv[1], base(), source="base") as checkpoints:
        checkpoints.save(golden())
