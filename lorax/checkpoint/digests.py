"""Digests of arrays: the same for every sharding, mesh and number of processes.

`of` is for what a checkpoint holds: 128 bits of BLAKE2b over dtype, shape and the
bytes in C order, taken on the host. `content` is for the frozen base, which may be too
large to gather: a sum over its words, taken where the shards are,

    lane_j = sum_i mix(word_i ^ (mix(i) + seed_j))  (mod 2^32),    j = 0..3

with `mix` the finaliser of MurmurHash3. `mix` is a bijection, so a change of one word
changes every lane; the index in it tells permutations apart; a sum has no order, so
no sharding changes it. It tells bases apart, it does not withstand forgery.

References:
  Aumasson et al., "BLAKE2", RFC 7693. Appleby, "MurmurHash3", fmix32.
"""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from lorax import tree
from lorax.types import PyTree

SEEDS = (0x9E3779B9, 0x3C6EF372, 0xDAA66D2B, 0x78DDE6E4)  # k 2^32 / golden ratio


def is_key(leaf: Any) -> bool:
    """True for typed PRNG keys, concrete or abstract."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def on_host(leaf: Any) -> np.ndarray:
    """Returns a copy of the whole array in host memory, on every process.

    Args:
      leaf: an array, sharded or not; of a typed PRNG key the data is taken. If it is
        sharded over processes all of them must call this.
    """
    leaf = jax.random.key_data(leaf) if is_key(leaf) else leaf
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        if leaf.is_fully_replicated:
            leaf = leaf.addressable_data(0)
        else:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.array(leaf, order="C")  # a copy: a view would keep a donated buffer


def of(array: np.ndarray) -> str:
    """Returns 32 hex digits: BLAKE2b over dtype, shape and bytes in C order.

    Example:
      >>> of(np.zeros(2, np.float32)) == of(np.zeros((2, 1), np.float32))
      False
    """
    kind = f"{np.dtype(array.dtype).name} {list(array.shape)} "
    digest = hashlib.blake2b(kind.encode(), digest_size=16)
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def content(params: PyTree) -> dict[str, dict[str, Any]]:
    """Returns by path the shape, the dtype and a 128-bit sum of the content.

    Args:
      params: any tree of arrays, sharded or not; nothing is gathered. Abstract leaves
        have the content None.

    Returns:
      `{path: {"shape": [...], "dtype": name, "content": 32 hex digits or None}}`; of a
      `Base` its frozen arrays too, as `frozen:name`.

    Example:
      >>> content({"w": jnp.zeros(2, jnp.int8)})["w"]["content"]
      'e32f6afb092d86deb81864035f6b1cd2'
    """
    leaves = tree.flatten(params)
    leaves |= {f"frozen:{name}": x for name, x in tree.split(params)[1].items()}
    with jax.ensure_compile_time_eval():  # known leaves, closed over by a jit
        lanes = {p: _lanes(x) for p, x in leaves.items() if tree.is_concrete(x)}
    described = {}
    for path, leaf in leaves.items():
        words = on_host(lanes[path]) if path in lanes else None
        described[path] = {
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype),
            "content": None if words is None else words.astype(">u4").tobytes().hex(),
        }
    return described


@jax.jit
def _lanes(leaf: jax.Array) -> jax.Array:
    words = _words(leaf)
    index = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):
        place = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        index += place * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    place = _mix(index)
    lane = lambda seed: jnp.sum(_mix(words ^ (place + jnp.uint32(seed))))
    return jnp.stack([lane(seed) for seed in SEEDS])  # [4]


def _words(leaf: jax.Array) -> jax.Array:
    """The bits of each element as uint32; an element of 64 bits makes two."""
    leaf = jax.random.key_data(leaf) if is_key(leaf) else leaf
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag], axis=-1)
    bits = jax.dtypes.itemsize_bits(leaf.dtype)
    if bits < 8 or leaf.dtype == jnp.bool:
        return leaf.astype(jnp.int8).astype(jnp.uint32)
    if bits >= 32:
        return jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    width = {8: jnp.uint8, 16: jnp.uint16}[bits]
    return jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
