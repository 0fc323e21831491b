"""Digests: numpy and hashlib by hand, any sharding, every bit."""

from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorax.checkpoint import digests


def fmix32(x):
    """MurmurHash3's finaliser, on Python integers."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * factor % 2**32
    return x ^ (x >> 16)


def content_of(words):
    """The four lanes over a flat list of 32-bit words."""
    lanes = []
    for k in range(1, 5):
        seed = k * 0x9E3779B9 % 2**32
        mixed = (fmix32(w ^ (fmix32(i) + seed) % 2**32) for i, w in enumerate(words))
        lanes.append(sum(mixed) % 2**32)
    return "".join(f"{lane:08x}" for lane in lanes)


CASES = [
    (jnp.float32, np.uint32),
    (jnp.int32, np.uint32),
    (jnp.bfloat16, np.uint16),
    (jnp.float16, np.uint16),
    (jnp.float8_e4m3fn, np.uint8),
    (jnp.int8, np.uint8),
    (jnp.complex64, np.uint32),
]


@pytest.mark.parametrize("dtype, words", CASES, ids=lambda d: np.dtype(d).name)
def test_the_content_by_hand(dtype, words):
    array = np.random.default_rng(0).integers(-9, 9, (3, 5)).astype(dtype)
    expected = content_of(array.reshape(-1).view(words).tolist())
    entry = digests.content({"w": jnp.asarray(array)})["w"]
    assert entry == {"shape": [3, 5], "dtype": str(array.dtype), "content": expected}


def test_the_content_of_keys_scalars_and_shapes():
    tree = {
        "key": jax.random.key(5),
        "on": jnp.asarray(True),
        "none": jnp.zeros((0, 3)),
    }
    found = digests.content(tree | {"abstract": jax.ShapeDtypeStruct((2,), jnp.int8)})
    assert found["key"]["content"] == content_of([0, 5])
    assert found["on"]["content"] == content_of([1])
    assert found["none"]["content"] == "0" * 32
    assert found["abstract"] == {"shape": [2], "dtype": "int8", "content": None}


def test_every_bit_and_every_place_counts():
    rng = np.random.default_rng(1)
    array = rng.standard_normal(40).astype(np.float32)
    seen = {digests.content({"w": array})["w"]["content"], digests.of(array)}
    for _ in range(20):
        changed = array.copy()
        changed.view(np.uint32)[rng.integers(40)] ^= np.uint32(1 << rng.integers(32))
        seen |= {digests.content({"w": changed})["w"]["content"], digests.of(changed)}
    moved = np.roll(array, 1)
    seen |= {digests.content({"w": moved})["w"]["content"], digests.of(moved)}
    assert len(seen) == 44


def test_a_digest_by_hand():
    array = np.array([[1.0], [2.0]], np.float32)
    data = b"float32 [2, 1] \x00\x00\x80\x3f\x00\x00\x00\x40"
    assert digests.of(array) == hashlib.blake2b(data, digest_size=16).hexdigest()
    assert digests.of(np.asfortranarray(np.eye(3)[:2])) == digests.of(np.eye(3)[:2])
    others = [array[:, 0], array.astype(np.float64), array.view(np.int32)]
    assert digests.of(array) not in [digests.of(other) for other in others]


def test_no_sharding_changes_a_digest():
    array = np.random.default_rng(2).standard_normal((8, 4)).astype(np.float32)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    expected = digests.content({"w": array}), digests.of(array)
    for spec in (P(), P("x"), P(None, "y"), P(("x", "y")), P("y", "x")):
        leaf = jax.device_put(array, NamedSharding(mesh, spec))
        found = digests.content({"w": leaf}), digests.of(digests.on_host(leaf))
        assert found == expected, spec
