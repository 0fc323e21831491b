"""Merging into a quantised base: to dense kernels, or to codes on the same grid."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax.quantized import NF4, Fp8, Int4, Int8, dequantize, recode
from lorax.types import Axes

STACK = Axes((0, 2), (3,), (1,))
SHAPE = (2, 3, 32, 5)
FORMS = {
    "int8": Int8(),
    "int4": Int4(),
    "int4 asymmetric": Int4(symmetric=False),
    "nf4": NF4(),
    "nf4 single": NF4(double=False),
    "fp8": Fp8(),
}


def normal(*shape, seed=0):
    draw = np.random.default_rng(seed).standard_normal(shape)
    return jax.device_put(draw.astype(np.float32))


def packed(name):
    leaf = FORMS[name.removesuffix(" shifted")].quantize(normal(*SHAPE), STACK)
    if not name.endswith(" shifted"):
        return leaf
    return dataclasses.replace(leaf, shifts=0.3 * normal(*leaf.scales.shape, seed=5))


NAMES = [*FORMS, "int4 shifted"]


def test_by_hand():
    """Scales of 1 and 2, and a last code of 127."""
    leaf = Int8().quantize(jnp.array([[127.5, -255.0], [1.0, 6.0]]), Axes((0,), (1,)))
    assert leaf.scales.tolist() == [[1.0, 2.0]]
    again = recode(leaf, jnp.array([[126.4, -300.0], [2.5, 6.9]]))
    assert again.codes.tolist() == [[126, -128], [2, 3]]
    assert again.scales is leaf.scales


@pytest.mark.parametrize("name", NAMES)
def test_a_leafs_own_values_have_its_codes(name):
    leaf = packed(name)
    jax.tree.map(np.testing.assert_array_equal, recode(leaf, dequantize(leaf)), leaf)


@pytest.mark.parametrize("name", NAMES)
def test_every_code_is_the_nearest(name):
    leaf = packed(name)
    kernel = dequantize(leaf) + 0.3 * normal(*SHAPE, seed=1)
    found = np.abs(np.asarray(dequantize(recode(leaf, kernel)) - kernel))
    if leaf.block:  # a byte of two equal codes
        codes = [17 * code for code in range(16)]
    else:
        codes = np.arange(256, dtype=np.uint8).view(leaf.codes.dtype)
        codes = codes[np.isfinite(codes.astype(np.float32))]
    full = [jnp.full_like(leaf.codes, code) for code in codes]
    values = [dequantize(dataclasses.replace(leaf, codes=c)) for c in full]
    least = np.abs(np.asarray(values) - np.asarray(kernel)).min(0)
    np.testing.assert_allclose(found, least, atol=1e-6)


def test_a_scale_of_zero_stays():
    leaf = Int8().quantize(normal(8, 2), Axes((0,), (1,)))
    leaf = dataclasses.replace(leaf, scales=leaf.scales.at[0, 1].set(0))
    again = recode(leaf, normal(8, 2, seed=1))
    assert (again.codes[:, 1] == 0).all() and (again.codes[:, 0] != 0).any()


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_only_what_has_an_adapter_gets_codes_anew(name):
    params = {"w": packed(name), "v": packed(name), "bias": jnp.zeros(3)}
    lora = lorax.Lora(
        0.1 * normal(3, 2, 32, 4), 0.1 * normal(3, 4, 5, seed=1), 2.0, STACK
    )
    merged = lorax.merge({"w": lora}, params, requantize=True)
    assert merged["v"] is params["v"] and merged["bias"] is params["bias"]
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    want = recode(params["w"], lorax.merge({"w": lora}, params)["w"])
    jax.tree.map(np.testing.assert_array_equal, merged["w"], want)
    compiled = jax.jit(lambda a, p: lorax.merge(a, p, requantize=True))
    again = compiled({"w": lora}, params)["w"]
    np.testing.assert_allclose(dequantize(again), dequantize(want), atol=1e-2)
    plain = lorax.merge({"w": lora}, params)
    assert plain["v"].shape == plain["w"].shape == SHAPE
    assert not any(map(lorax.quantized.is_quantized, plain.values()))
