"""Digests: computed by hand with numpy and hashlib, for any sharding and every bit."""

from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorax.checkpoint import digests, storage


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
    told = {"shape": [3, 5], "dtype": str(array.dtype), "content": expected}
    leaves = {"device": jnp.asarray(array), "host": array, "rows": array[::-1][::-1]}
    assert digests.describe(leaves) == dict.fromkeys(leaves, told)


def test_more_words_than_are_summed_at_once(monkeypatch):
    array = np.random.default_rng(3).standard_normal((7, 11)).astype(np.float32)
    monkeypatch.setattr(digests, "BLOCK", 8)
    expected = content_of(array.reshape(-1).view(np.uint32).tolist())
    assert digests.describe({"w": array})["w"]["content"] == expected


def test_an_element_of_64_bits_makes_two_words():
    array = np.random.default_rng(4).standard_normal((3, 2))
    with jax.enable_x64(True):
        expected = content_of(array.reshape(-1).view("<u4").tolist())
        found = digests.describe({"device": jnp.asarray(array), "host": array})
    assert [entry["content"] for entry in found.values()] == [expected] * 2
    rounded = content_of(array.astype(np.float32).reshape(-1).view("<u4").tolist())
    found = digests.describe({"w": array})["w"]  # as JAX would hold it
    assert found == {"shape": [3, 2], "dtype": "float64", "content": rounded}


def test_the_content_of_keys_scalars_and_shapes():
    tree = {
        "key": jax.random.key(5),
        "on": jnp.asarray(True),
        "off": np.asarray(False),
        "few": jnp.asarray([-1, 3], jnp.int4),
        "few, on the host": np.asarray([-1, 3], jnp.int4),
        "none": jnp.zeros((0, 3)),
    }
    found = digests.describe(tree | {"abstract": jax.ShapeDtypeStruct((2,), jnp.int8)})
    assert found["key"]["content"] == content_of([0, 5])
    assert found["on"]["content"] == content_of([1])
    assert found["off"]["content"] == content_of([0])
    assert found["few"]["content"] == content_of([2**32 - 1, 3])
    assert found["few, on the host"] == found["few"]
    assert found["none"]["content"] == "0" * 32
    assert found["abstract"] == {"shape": [2], "dtype": "int8", "content": None}


def test_every_bit_and_every_place_counts():
    rng = np.random.default_rng(1)
    array = rng.standard_normal(40).astype(np.float32)
    content = lambda array: digests.describe({"w": array})["w"]["content"]
    seen = {content(array), digests.blake2b(array), digests.sha256(array)}
    for _ in range(20):
        changed = array.copy()
        changed.view(np.uint32)[rng.integers(40)] ^= np.uint32(1 << rng.integers(32))
        seen |= {content(changed), digests.blake2b(changed), digests.sha256(changed)}
    moved = np.roll(array, 1)
    seen |= {content(moved), digests.blake2b(moved), digests.sha256(moved)}
    assert len(seen) == 66


def test_the_sums_of_format_1_by_hand():
    array = np.array([[1.0], [2.0]], np.float32)
    data = b"float32 [2, 1] \x00\x00\x80\x3f\x00\x00\x00\x40"
    told = hashlib.blake2b(data, digest_size=16).hexdigest()
    assert digests.blake2b(array) == told
    assert digests.sha256(array) == hashlib.sha256(data[-8:]).hexdigest()
    rows = np.eye(3)[:2]
    assert digests.blake2b(np.asfortranarray(rows)) == digests.blake2b(rows)
    others = [array[:, 0], array.astype(np.float64), array.view(np.int32)]
    assert told not in [digests.blake2b(other) for other in others]
    kind = {"shape": [2, 1], "dtype": "float32"}
    assert digests.describe_as({"digest": ""}, array) == kind | {"digest": told}
    abstract = jax.eval_shape(lambda: array)
    assert digests.describe_as({"sha256": ""}, abstract) == kind | {"sha256": None}


def test_no_sharding_changes_a_digest():
    array = np.random.default_rng(2).standard_normal((8, 4)).astype(np.float32)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    expected = digests.describe({"w": array}), digests.blake2b(array)
    for spec in (P(), P("x"), P(None, "y"), P(("x", "y")), P("y", "x")):
        leaf = jax.device_put(array, NamedSharding(mesh, spec))
        found = digests.describe({"w": leaf}), digests.blake2b(storage.on_host(leaf))
        assert found == expected, spec
