"""Arrays between devices, host memory and orbax's files.

A leaf that is sharded over devices is written shard by shard, by the process that holds
the shard, and never gathered. A replicated leaf is written once, from a copy in host
memory. Reading calls no collectives: each process reads on its own, so an error on one
leaves no other waiting.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils


class DamagedError(ValueError):
    """A checkpoint, or a part of one, does not match what was written."""


def folder_of(path: str | os.PathLike[str]) -> epath.Path:
    """Returns the path in the form that orbax expects."""
    # Orbax needs absolute paths; a bucket's address already is one.
    folder = epath.Path(path)
    return folder if "://" in os.fspath(path) else folder.expanduser().absolute()


def is_key(leaf: Any) -> bool:
    """True for typed PRNG keys, concrete or abstract."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def on_host(leaf: Any) -> np.ndarray:
    """Returns a copy of the whole array in host memory, on every process.

    Args:
      leaf: an array, sharded or not; a typed PRNG key gives its key data. If it is
        sharded across processes, every process must call this.
    """
    leaf = jax.random.key_data(leaf) if is_key(leaf) else leaf
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        if leaf.is_fully_replicated:
            leaf = leaf.addressable_data(0)
        else:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.array(leaf, order="C")  # a copy: a view would keep a donated buffer


@jax.jit
def is_finite(leaf: jax.Array) -> jax.Array:
    """True if no value is NaN or infinite, computed on the shards; a bool, []."""
    return jnp.isfinite(leaf).all()


def to_write(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what to pass to orbax; once it has saved, the arrays may be donated.

    Args:
      leaves: arrays, or dicts of arrays, by name.
    """
    return {_item(name): jax.tree.map(_to_write, x) for name, x in leaves.items()}


def read(folder: epath.Path, want: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arrays of a folder by name, whole and in host memory.

    They are NumPy arrays, so they load whatever devices they were saved from.

    Args:
      folder: as orbax wrote it.
      want: all arrays in it, concrete or abstract, or dicts of these, by name.

    Raises:
      DamagedError: they cannot be read.
    """
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(own, {own})
    restore = {
        _item(name): jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), x)
        for name, x in want.items()
    }
    try:
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
        reader = ocp.Checkpointer(handler, multiprocessing_options=alone)
        with reader as checkpointer:
            args = ocp.args.PyTreeRestore(restore_args=restore)
            found = checkpointer.restore(folder, args=args)
    except Exception as error:  # whatever a damaged file makes orbax raise
        raise DamagedError(f"the arrays in {folder} are damaged: {error}") from error
    return {name: found.get(_item(name), {}) for name in want}


def reason(error: Exception) -> str:
    """The message of orbax or tensorstore, without the description of the file."""
    return str(error).split(" [tensorstore_spec")[0]


def _item(name: str) -> str:
    """The name as a key for orbax, which joins nested keys with dots."""
    return name.replace("%", "%25").replace(".", "%2E")


def _to_write(leaf: Any) -> jax.Array | np.ndarray:
    """A sharded leaf as it is; of any other, a copy of one replica in host memory.

    Orbax copies the shards of a sharded leaf to the host before its `save` returns.
    """
    leaf = jax.random.key_data(leaf) if is_key(leaf) else leaf
    if isinstance(leaf, jax.Array):
        if not leaf.is_fully_replicated:
            return leaf
        leaf = leaf.addressable_data(0)
    return np.array(leaf, order="C")
