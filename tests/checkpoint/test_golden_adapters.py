"""Committed adapters of formats 1 and 2: every later lorax and JAX must load them.

Written by this file, `python -m tests.checkpoint.test_golden_adapters FOLDER`, under
lorax 0.1.0, jax 0.10.2, orbax-checkpoint 0.12.8: format 1 before format 2 existed.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import pytest

from lorax import checkpoint
from lorax.adapters import Full, Lora
from lorax.types import Axes
from tests.checkpoint.states import same

HERE = pathlib.Path(__file__).parent
FOLDERS = [HERE / "golden_adapters_1", HERE / "golden_adapters_2"]


def counted(*shape, dtype=jnp.float32):
    return (jnp.arange(jnp.zeros(shape).size) / 4).reshape(shape).astype(dtype)


def golden():
    """Adapters and their base, from a formula."""
    lora = Lora(counted(6, 2), counted(2, 4), 16 / 3, Axes((0,), (1,)), dropout=0.1)
    adapters = {"a.b/kernel": lora, "head": Full(counted(4, dtype=jnp.bfloat16))}
    base = {"a.b": {"kernel": counted(6, 4)}, "head": counted(4, dtype=jnp.bfloat16)}
    return adapters, base


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_committed_adapters_load(folder):
    adapters, base = golden()
    assert same(checkpoint.load_adapters(folder, adapters, base), adapters)
    assert same(checkpoint.load_adapters(folder), adapters)
    with pytest.raises(ValueError, match="a.b/kernel: the adapters were made for ano"):
        other = jax.tree.map(lambda x: x + 1, base)
        checkpoint.load_adapters(folder, params=other)


def test_the_oldest_without_digests_load(tmp_path):
    adapters, base = golden()
    folder = tmp_path / "adapters"
    shutil.copytree(FOLDERS[0], folder)
    index = json.loads((folder / "adapters.json").read_text())
    del index["digests"]
    for entry in index["adapters"].values():
        del entry["module"]
        entry["class"] = {"lora": "Lora", "full": "Full"}[entry["class"]]
        for kind in entry["arrays"].values():
            del kind["digest"]
    (folder / "adapters.json").write_text(json.dumps(index))
    assert same(checkpoint.load_adapters(folder, adapters, base), adapters)


if __name__ == "__main__":
    checkpoint.save_adapters(sys.argv[1], *golden())
