"""What a checkpoint says of an array: shape, dtype, and a sum over its content.

    {"shape": [6, 4], "dtype": "float32", "content": 32 hex digits}

The sum is the same for every sharding, mesh and number of processes, and is taken where
the shards are, so that nothing is gathered for it: over the words of the array

    lane_j = sum_i mix(word_i ^ (mix(i) + seed_j))  (mod 2^32),    j = 0..3

with `mix` the finaliser of MurmurHash3. `mix` is a bijection, so a change of one word
changes every lane; the index in it tells permutations apart; a sum has no order, so
no sharding changes it. It tells arrays apart, it does not withstand forgery.

Files of format 1 have other sums, which are read and no longer written: `digest`, 128
bits of BLAKE2b over dtype, shape and the bytes in C order; of the base of adapters
`sha256`, of the bytes. The oldest have none.

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
BLOCK = 2**16  # words summed at once on the host: they stay in the cache

Entry = dict[str, Any]
"""What is said of one array: JSON data."""

SUMS = {
    "content": untrusted.digits(32),
    "digest": untrusted.digits(32),
    "sha256": untrusted.digits(64),
}
"""What a sum must be, by its name."""


def kind(array: Any) -> Entry:
    """Returns shape and dtype as JSON data."""
    return {"shape": list(array.shape), "dtype": array.dtype.name}


def describe(leaves: Mapping[str, Any]) -> dict[str, Entry]:
    """Returns the entries of arrays; abstract ones have the content None.

    Args:
      leaves: arrays by name, sharded or not. If one is sharded over processes all of
        them must call this.

    Example:
      >>> describe({"w": jnp.zeros(2, jnp.int8)})["w"]["content"]
      'e32f6afb092d86deb81864035f6b1cd2'
    """
    known = {
        name: x
        for name, x in leaves.items()
        if all(map(tree.is_concrete, jax.tree.leaves(x)))
    }
    with jax.ensure_compile_time_eval():  # known leaves, closed over by a jit
        sums = {name: _sum(leaf) for name, leaf in known.items()}
    described = {name: kind(x) | {"content": None} for name, x in leaves.items()}
    for name, lanes in sums.items():
        text = storage.on_host(lanes).astype(">u4").tobytes().hex()
        described[name]["content"] = text
    return described


def describe_base(params: PyTree) -> dict[str, Entry]:
    """Returns the entries of a parameter tree by path.

    Args:
      params: any tree of arrays; of a `Base` its frozen arrays too, as `frozen:name`.
    """
    frozen = {f"frozen:{name}": x for name, x in tree.split(params)[1].items()}
    return describe(tree.flatten(params) | frozen)


def describe_as(told: Entry, leaf: Any) -> Entry:
    """Returns the entry of an array, by the sum that `told` has."""
    earlier = next((name for name in _EARLIER if name in told), None)
    if earlier is None:
        return describe({"": leaf})[""]
    known = tree.is_concrete(leaf)
    value = _EARLIER[earlier](storage.on_host(leaf)) if known else None
    return kind(leaf) | {earlier: value}


def difference(then: Entry, now: Entry) -> tuple[str, Any, Any] | None:
    """Returns the first field in which two entries differ, and its two values.

    A field that one of them lacks, or has as None, does not count.

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
    """Raises ValueError naming the first leaf of a base that is another.

    Args:
      then: entries by path, as saved.
      now: of the params at hand.
      made: what was made on the base that was saved, for errors.
    """
    for path, entry in now.items():
        if differs := difference(then.get(path, {}), entry):
            field, old, new = differs
            raise ValueError(
                f"{path}: {made}: {field} {old} there, {new} in params. Pass the "
                "params that lorax.init returned (an init may change them), or none to "
                "leave the base unchecked"
            )


def require_intact(
    where: str, told: Mapping[str, Entry], arrays: Mapping[str, Any]
) -> None:
    """Raises DamagedError naming the first array that is not as its entry says.

    Args:
      where: what the names belong to, for errors.
      told: entries by name.
      arrays: in host memory, by name; of a PRNG key the data.
    """
    for name, entry in told.items():
        array = arrays.get(name)
        if not isinstance(array, np.ndarray):
            raise DamagedError(f"{where}{name} is missing")
        now = describe_as(entry, array)
        if entry["dtype"].startswith("key<"):
            now |= {"shape": entry["shape"], "dtype": entry["dtype"]}
        if differs := difference(entry, now):
            raise DamagedError(f"{where}{name} is damaged: its {differs[0]} is another")


def require_form(told: Any, where: str, abstract: bool = False) -> None:
    """Raises ValueError unless an entry that was read has the form of one.

    Args:
      told: the entry, of any format.
      where: its place, for errors.
      abstract: True where the sum may be null.
    """
    untrusted.field(told, "shape", untrusted.SHAPE, where)
    untrusted.field(told, "dtype", untrusted.TEXT, where)
    name = next((name for name in SUMS if name in told), "content")
    rule = SUMS[name] | None if abstract else SUMS[name]
    untrusted.field(told, name, rule, where)


# The sum: its definition, on the host, and the same on devices


def _sum(leaf: Any) -> np.ndarray | jax.Array:
    """The four lanes, [4] uint32; of a quantised leaf from those of its arrays."""
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
    """The bits of each element as unsigned, in order; one of 64 bits makes two."""
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
    """The bits of each element as uint32; an element of 64 bits makes two."""
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
    """The finaliser of MurmurHash3, over uint32 of numpy or JAX."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


# The sums of format 1


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
