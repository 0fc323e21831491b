"""The formats: codes by hand, and what a round trip loses."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax.quantized import (
    FORMATS,
    NF4,
    Fp8,
    Int4,
    Int8,
    Quantized,
    codebooks,
    dequantize,
    formats,
)
from lorax.types import Axes

PLAIN = Axes((0,), (1,))
NAMES = sorted(FORMATS)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def column(leaf, signed=False):
    """The codes of a one-column kernel: the halves of a block share bytes."""
    pairs = np.asarray(leaf.codes).reshape(-1, 1, leaf.block // 2)
    found = np.concatenate([pairs >> 4, pairs & 15], 1).ravel().astype(int)
    return np.where(signed & (found > 7), found - 16, found).tolist()


def test_int8_by_hand():
    kernel = jnp.array([[127.5, -255.0], [-127.5, 63.0], [1.4, 127.0]])
    leaf = Int8().quantize(kernel, PLAIN)
    scales = np.array([[1.0, 2.0]], np.float32)
    np.testing.assert_array_equal(leaf.scales, scales)
    # 127.5 rounds to even, 128, which is out of range
    assert leaf.codes.tolist() == [[127, -128], [-128, 32], [1, 64]]
    np.testing.assert_allclose(dequantize(leaf), leaf.codes * scales, rtol=1e-7)


def test_int4_by_hand():
    kernel = jnp.array([7.5, -2.5, 1.5, 0.4, 0.0, 3.0, 1.0, 12.0])[:, None]
    leaf = Int4(group=4).quantize(kernel, PLAIN)
    np.testing.assert_allclose(leaf.scales[:, 0], [1.0, 1.6], rtol=1e-6)
    # -2.5 and 1.5 round to even; 12 / 1.6 is about 7.5, and 8 is out of range
    assert column(leaf, signed=True) == [7, -2, 2, 0, 0, 2, 1, 7]
    leaf = Int4(group=4, symmetric=False).quantize(kernel, PLAIN)
    assert leaf.zeros[:, 0].tolist() == [-4, -8]  # -8 + 2.5 / (10 / 15), and -8
    np.testing.assert_allclose(leaf.scales[:, 0], [10 / 15, 12 / 15], rtol=1e-6)
    assert column(leaf, signed=True) == [7, -8, -2, -3, -8, -4, -7, 7]
    assert dequantize(leaf)[4, 0] == 0 and dequantize(leaf)[7, 0] == pytest.approx(12)


def test_nf4_by_hand():
    values = codebooks.NF4
    halves = (values[1:] + values[:-1]) / 2
    drawn = np.concatenate([values, halves + 1e-3, [1], halves - 1e-3, [1]])
    kernel = jnp.asarray(3 * drawn)[:, None]
    leaf = NF4(block=16, double=False).quantize(kernel, PLAIN)
    up, down = [*range(1, 16)], [*range(15)]
    assert column(leaf) == [*range(16), *up, 15, *down, 15]
    assert leaf.scales[:, 0].tolist() == [3, 3, 3]
    np.testing.assert_array_equal(dequantize(leaf)[:16, 0], 3 * values)


def test_the_dynamic_map_is_symmetric_and_rising():
    table = codebooks.dynamic_map()
    assert table.shape == (256,) and (np.diff(table) > 0).all()
    assert table[-1] == 1 and 0 in table
    assert {*-table[table < 0]} == {*table[table > 0]} - {np.float32(1)}
    small = table[(table > 0) & (table < 1e-5)]
    np.testing.assert_allclose(small, [5.5e-7, 3.25e-6, 7.75e-6], rtol=1e-6)


# the format's relative error in the Frobenius norm, for normal weights
ERRORS = {
    "int8": (Int8(), 0.010),
    "int8 in groups": (Int8(group=64), 0.007),
    "int4": (Int4(), 0.110),
    "int4 asymmetric": (Int4(symmetric=False), 0.097),
    "nf4": (NF4(), 0.093),
    "nf4 single": (NF4(double=False), 0.093),
    "fp8": (Fp8(), 0.027),
}
LAYOUTS = {
    "dense": ((512, 24), PLAIN),
    "narrow heads in": ((16, 32, 24), Axes((0, 1), (2,))),
    "stacked in the middle": ((512, 3, 4, 6), Axes((0,), (2, 3), (1,))),
}


@pytest.mark.once
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ERRORS)
def test_what_a_round_trip_loses(form, layout):
    (form, most), (shape, axes) = ERRORS[form], LAYOUTS[layout]
    kernel = normal(*shape)
    leaf = form.quantize(jnp.asarray(kernel), axes)
    back = np.asarray(dequantize(leaf))
    assert (leaf.shape, leaf.ndim, leaf.size) == (shape, len(shape), kernel.size)
    error = np.linalg.norm(back - kernel) / np.linalg.norm(kernel)
    assert most / 1.6 < error < most


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_of_a_stack_is_quantised_by_itself(name):
    kernel, axes = jnp.asarray(normal(64, 3, 4, 6)), Axes((0,), (2, 3), (1,))
    leaf = FORMATS[name].quantize(kernel, axes)
    for index in range(3):
        alone = FORMATS[name].quantize(kernel[:, index], Axes((0,), (1, 2)))
        layer = leaf.layer(index)
        assert layer.axes == alone.axes and layer.shape == (64, 4, 6)
        for one, other in itertools.zip_longest(*map(jax.tree.leaves, (layer, alone))):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(dequantize(layer), dequantize(leaf)[:, index])


@pytest.mark.parametrize("name", NAMES)
def test_the_transpose_has_the_same_codes(name):
    kernel = jnp.asarray(normal(128, 48))
    one = FORMATS[name].quantize(kernel, PLAIN)
    other = FORMATS[name].quantize(kernel.T, Axes((1,), (0,)))
    np.testing.assert_array_equal(one.codes, other.codes)
    np.testing.assert_array_equal(dequantize(one), dequantize(other).T)


@pytest.mark.parametrize("name", NAMES)
def test_zeros_and_tiny_weights_stay_finite(name):
    kernel = jnp.zeros((128, 4)).at[:, 1].set(1e-30).at[:64, 2].set(1e30)
    back = dequantize(FORMATS[name].quantize(kernel, PLAIN))
    assert jnp.isfinite(back).all() and (back[:, 0] == 0).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_kernels_dtype_comes_back(dtype):
    kernel = jnp.asarray(normal(128, 8)).astype(dtype)
    leaf = Int8().quantize(kernel, PLAIN)
    wide = Int8().quantize(kernel.astype(jnp.float32), PLAIN)
    assert leaf.dtype == dequantize(leaf).dtype == dtype
    np.testing.assert_array_equal(dequantize(leaf), dequantize(wide).astype(dtype))


def test_bytes_are_those_of_a_compiled_program():
    kernel = jax.ShapeDtypeStruct((1024, 512), jnp.float32)
    for name, bits in {"int8": 8.03, "int4": 4.5, "nf4": 4.13, "fp8": 8.03}.items():
        leaf = jax.eval_shape(lambda k, n=name: FORMATS[n].quantize(k, PLAIN), kernel)
        compiled = jax.jit(dequantize).lower(leaf).compile()
        assert compiled.memory_analysis().argument_size_in_bytes == leaf.nbytes
        assert 8 * leaf.nbytes / leaf.size == pytest.approx(bits, abs=0.01)


def test_a_leaf_is_a_pytree_that_jit_and_vmap_take():
    kernel, axes = jnp.asarray(normal(3, 64, 8)), Axes((1,), (2,), (0,))
    leaf = NF4().quantize(kernel, axes)
    one = dataclasses.replace(leaf, axes=PLAIN)  # as vmap sees it
    np.testing.assert_array_equal(jax.vmap(dequantize)(one), dequantize(leaf))
    assert isinstance(jax.tree.map(lambda x: x, leaf), Quantized)


@pytest.mark.parametrize("form", [Int4(group=3), Int4(group=None), NF4(block=9)])
def test_a_byte_is_not_parted(form):
    with pytest.raises(ValueError, match="share bytes in pairs along the inputs"):
        form.quantize(jnp.ones((9, 4)), PLAIN)


@pytest.mark.parametrize(
    "inputs, group, fits",
    [((576,), 128, "16, 32, 64, 96, 192"), ((3, 16), 64, "16"), ((30,), 64, "30")],
)
def test_groups_that_do_not_divide(inputs, group, fits):
    with pytest.raises(ValueError, match=rf"such as {fits}, or None"):
        formats.tiles(inputs, group)
