"""What a checkpoint records of an array: shape, dtype, and a checksum of its content.

    {"shape": [6, 4], "dtype": "float32", "content": 32 hex digits}

The checksum is the same for every sharding, mesh and number of processes, and is
computed where the shards are, without gathering them. Over the words of the array,

    lane_j = sum_i mix(word_i ^ (mix(i) + seed_j))  (mod 2^32),    j = 0..3

with `mix` the finaliser of MurmurHash3. `mix` is a bijection, so changing one word
changes every lane; the index makes permutations differ; and the order of a sum does not
matter, so sharding does not change it. It tells arrays apart; it is not cryptographic.

Files of format 1 have other checksums, which are still read but no longer written:
`digest`, 128 bits of BLAKE2b over dtype, shape and the bytes in C order; and `sha256`
over the bytes, for the base of saved adapters. The oldest files have none.

References:
  Appleby, "MurmurHash3", fmix32. Aumasson et al., "BLAKE2", RFC 7693.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax import tree, untrusted
from lorax.checkpoint import storage
from lorax.checkpoint.storage import DamagedError
from lorax.types import PyTree

SEEDS = (0x9E3779B9, 0x3C6EF372, 0xDAA66D2B, 0x78DDE6E4)  # k 2^32 / golden ratio
BLOCK = 2**16  # words summed at once on the host; small enough to stay in the cache

Entry = dict[str, Any]
"""The record of one array: JSON data."""

SUMS = {
    "content": untrusted.digits(32),
    "digest": untrusted.digits(32),
    "sha256": untrusted.digits(64),
}
"""What each kind of checksum must look like."""


def kind(array: Any) -> Entry:
    """Returns the shape and dtype as JSON data."""
    return {"shape": list(array.shape), "dtype": array.dtype.name}


def describe(leaves: Mapping[str, Any]) -> dict[str, Entry]:
    """Returns the entries of arrays; abstract arrays have content None.

    Args:
      leaves: arrays by name, sharded or not. If one is sharded across processes, every
        process must call this.

    Example:
      >>> describe({"w": jnp.zeros(2, jnp.int8)})["w"]["content"]
      'e32f6afb092d86deb81864035f6b1cd2'
    """
    known = {
        name: x
        for name, x in leaves.items()
        if all(map(tree.is_concrete, jax.tree.leaves(x)))
    }
    with jax.ensure_compile_time_eval():  # concrete leaves may be closed over by a jit
        sums = {name: _sum(leaf) for name, leaf in known.items()}
    described = {name: kind(x) | {"content": None} for name, x in leaves.items()}
    for name, lanes in sums.items():
        text = storage.on_host(lanes).astype(">u4").tobytes().hex()
        described[name]["content"] = text
    return described


def describe_base(params: PyTree) -> dict[str, Entry]:
    """Returns the entries of a parameter tree by path.

    Args:
      params: any tree of arrays; the frozen arrays of a `Base` appear as `frozen:name`.
    """
    frozen = {f"frozen:{name}": x for name, x in tree.split(params)[1].items()}
    return describe(tree.flatten(params) | frozen)


def describe_as(told: Entry, leaf: Any) -> Entry:
    """Returns the entry of an array, with the kind of checksum that `told` has."""
    earlier = next((name for name in _EARLIER if name in told), None)
    if earlier is None:
        return describe({"": leaf})[""]
    known = tree.is_concrete(leaf)
    value = _EARLIER[earlier](storage.on_host(leaf)) if known else None
    return kind(leaf) | {earlier: value}


def difference(then: Entry, now: Entry) -> tuple[str, Any, Any] | None:
    """Returns the first field in which two entries differ, with both values.

    A field that is missing or None in either entry is ignored.

    Example:
      >>> difference({"shape": [3], "content": None}, {"shape": [4], "content": "0"})
      ('shape', [3], [4])
    """
    for field, value in now.items():
        if None not in (value, then.get(field)) and value != then[field]:
            return field, then[field], value
    return None


def require_base(
    then: Mapping[str, Entry], now: Mapping[str, Entry], made: str
) -> None:
    """Raises ValueError naming the first leaf of a base that differs.

    Args:
      then: entries by path, as saved.
      now: entries of the current params.
      made: says what was made on another base, for errors.
    """
    for path, entry in now.items():
        if differs := difference(then.get(path, {}), entry):
            field, old, new = differs
            raise ValueError(
                f"{path}: {made}: {field} {old} there, {new} in params. Pass the "
                "params that lorax.init returned (an init may change them), or none to "
                "skip this check"
            )


def require_intact(
    where: str, told: Mapping[str, Entry], arrays: Mapping[str, Any]
) -> None:
    """Raises DamagedError naming the first array that does not match its entry.

    Args:
      where: what the names belong to, for errors.
      told: entries by name.
      arrays: in host memory, by name; a PRNG key is given as its key data.
    """
    for name, entry in told.items():
        array = arrays.get(name)
        if not isinstance(array, np.ndarray):
            raise DamagedError(f"{where}{name} is missing")
        now = describe_as(entry, array)
        if entry["dtype"].startswith("key<"):
            now |= {"shape": entry["shape"], "dtype": entry["dtype"]}
        if differs := difference(entry, now):
            raise DamagedError(f"{where}{name} is damaged: its {differs[0]} differs")


def require_form(told: Any, where: str, abstract: bool = False) -> None:
    """Raises ValueError unless an entry read from a file is well formed.

    Args:
      told: the entry, in any format.
      where: its location, for errors.
      abstract: True if the checksum may be null.
    """
    untrusted.field(told, "shape", untrusted.SHAPE, where)
    untrusted.field(told, "dtype", untrusted.TEXT, where)
    name = next((name for name in SUMS if name in told), "content")
    rule = SUMS[name] | None if abstract else SUMS[name]
    untrusted.field(told, name, rule, where)


# The checksum: defined on the host, and the same on devices


def _sum(leaf: Any) -> np.ndarray | jax.Array:
    """The four lanes, [4] uint32; a quantised leaf combines those of its arrays."""
    if tree.is_quantized(leaf):
        total = np.zeros(len(SEEDS), np.uint32)
        for number, part in enumerate(jax.tree.leaves(leaf)):
            lanes = np.asarray(storage.on_host(_sum(part)))
            total += _mix(lanes + _mix(np.full(1, number, np.uint32)))
        return total
    on_device = isinstance(leaf, jax.Array)
    return _sum_on_devices(leaf) if on_device else sum_on_host(np.asarray(leaf))


def sum_on_host(array: np.ndarray) -> np.ndarray:
    """Returns the lanes of an array as JAX would hold it, [4] uint32."""
    words = _words_on_host(array)
    lanes = np.zeros(len(SEEDS), np.uint32)
    for start in range(0, words.size, BLOCK):
        block = words[start : start + BLOCK].astype(np.uint32)
        index = np.arange(start, start + block.size, dtype=np.uint64)
        place = _mix(index.astype(np.uint32))
        for lane, seed in enumerate(SEEDS):
            mixed = _mix(block ^ (place + np.uint32(seed)))
            lanes[lane : lane + 1] += np.sum(mixed, dtype=np.uint32, keepdims=True)
    return lanes


def _words_on_host(array: np.ndarray) -> np.ndarray:
    """Each element's bits as unsigned words, in order; 64-bit elements give two."""
    array = np.ascontiguousarray(
        array, jax.dtypes.canonicalize_dtype(array.dtype)
    ).reshape(-1)
    if array.dtype == np.bool or jax.dtypes.itemsize_bits(array.dtype) < 8:
        return array.astype(np.int8).astype(np.uint32)
    return array.view(f"u{min(array.dtype.itemsize, 4)}")


@jax.jit
def _sum_on_devices(leaf: jax.Array) -> jax.Array:
    words = _words(leaf)
    index = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):
        place = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        index += place * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    place = _mix(index)
    lanes = [jnp.sum(_mix(words ^ (place + jnp.uint32(seed)))) for seed in SEEDS]
    return jnp.stack(lanes)


def _words(leaf: jax.Array) -> jax.Array:
    """Each element's bits as uint32 words; 64-bit elements give two."""
    leaf = jax.random.key_data(leaf) if storage.is_key(leaf) else leaf
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag], axis=-1)
    bits = jax.dtypes.itemsize_bits(leaf.dtype)
    if bits < 8 or leaf.dtype == jnp.bool:
        return leaf.astype(jnp.int8).astype(jnp.uint32)
    if bits >= 32:
        return jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    width = {8: jnp.uint8, 16: jnp.uint16}[bits]
    return jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)


def _mix(x: Any) -> Any:
    """The finaliser of MurmurHash3, on NumPy or JAX uint32."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


# The checksums of format 1


def blake2b(array: np.ndarray) -> str:
    """Returns 32 hex digits: BLAKE2b over dtype, shape and bytes in C order.

    Example:
      >>> blake2b(np.zeros(2, np.float32)) == blake2b(np.zeros((2, 1), np.float32))
      False
    """
    told = f"{np.dtype(array.dtype).name} {list(array.shape)} "
    digest = hashlib.blake2b(told.encode(), digest_size=16)
    digest.update(_bytes(array))
    return digest.hexdigest()


def sha256(array: np.ndarray) -> str:
    """Returns 64 hex digits: SHA-256 over the bytes in C order."""
    return hashlib.sha256(_bytes(array)).hexdigest()


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


_EARLIER = {"digest": blake2b, "sha256": sha256}
