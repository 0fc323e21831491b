"""qwix's QArrays as quantised leaves, compared with qwix's own values."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax.quantized import Quantized, dequantize

pytestmark = pytest.mark.once

qwix = pytest.importorskip("qwix", reason="needs the golden extra")
ours = pytest.importorskip("lorax.interop.qwix")


def normal(*shape, seed=0):
    draw = np.random.default_rng(seed).standard_normal(shape)
    return jax.device_put(draw.astype(np.float32))


TILES = {"tiled_axes": {0: 32}, "channelwise_axes": [1]}
ROWS = {
    "int8": {"qtype": jnp.int8, "channelwise_axes": [1]},
    "int8 of a tensor": {"qtype": jnp.int8},
    "int8 tiled both ways": {"qtype": jnp.int8, "tiled_axes": {0: 32, 1: 8}},
    "int8 asymmetric": {"qtype": jnp.int8, "calibration_method": "minmax", **TILES},
    "int4": {"qtype": jnp.int4, **TILES},
    "int4 asymmetric": {"qtype": jnp.int4, "calibration_method": "minmax", **TILES},
    "int4 a scale an input": {"qtype": jnp.int4, "channelwise_axes": [0]},
    "int3": {"qtype": "int3", **TILES},
    "uint4": {"qtype": jnp.uint4, **TILES},
    "nf4": {"qtype": "nf4", **TILES},
    "nf4 in threes": {"qtype": "nf4", "tiled_axes": {0: 3}},
    "fp8": {"qtype": jnp.float8_e4m3fn, "channelwise_axes": [1]},
    "fp8 e5m2": {"qtype": jnp.float8_e5m2, "channelwise_axes": [1]},
    "mxfp4": {"qtype": "mxfp4", "tiled_axes": {0: 32}},
}


@pytest.mark.parametrize("row", ROWS)
def test_the_values_are_those_of_qwix(row):
    array = qwix.quantize(normal(96, 24), **ROWS[row])
    leaf = ours.from_qarrays({"w": array})["w"]
    assert isinstance(leaf, Quantized) and leaf.shape == (96, 24)
    np.testing.assert_array_equal(dequantize(leaf), qwix.dequantize(array))
    four = row.startswith(("int4", "int3", "nf4")) and "threes" not in row
    assert (leaf.block > 0) == four, leaf.block


@pytest.mark.parametrize("row", ["int8", "int4 asymmetric", "nf4"])
def test_scales_in_bfloat16_are_the_dtype(row):
    array = qwix.quantize(normal(96, 24).astype(jnp.bfloat16), **ROWS[row])
    leaf = ours.from_qarrays({"w": array})["w"]
    assert leaf.dtype == array.scale.dtype == jnp.bfloat16
    found = np.asarray(dequantize(leaf), np.float32)
    want = np.asarray(qwix.dequantize(array), np.float32)
    # qwix rounds the table of NF4 to bfloat16 before the product
    np.testing.assert_allclose(found, want, rtol=2**-7 if row == "nf4" else 0)


def test_zeros_in_other_tiles_than_scales():
    array = qwix.quantize(normal(96, 24), **ROWS["int8 asymmetric"])
    array = dataclasses.replace(array, zero_point=array.zero_point[:, :1])
    leaf = ours.from_qarrays({"w": array})["w"]
    np.testing.assert_array_equal(dequantize(leaf), qwix.dequantize(array))


class Layer(nn.Module):
    """A layer with a heads axis in the middle."""

    @nn.compact
    def __call__(self, x, _):
        heads = nn.DenseGeneral((4, 16), use_bias=False, name="q")(x)
        mixed = nn.DenseGeneral(64, axis=(-2, -1), name="o")(jnp.tanh(heads))
        return x + mixed, None


class Model(nn.Module):
    """Two layers, in a scan."""

    @nn.compact
    def __call__(self, x):
        layers = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        return nn.scan(Layer, length=2, **layers)(name="layers")(x, None)[0]


def test_a_model_and_its_adapters():
    """A scanned stack with heads; each layer and output has its own scales."""
    model, x = Model(), normal(3, 64)
    dense = model.init(jax.random.key(0), x)["params"]
    channels = {"q": [0, 2, 3], "o": [0, 3]}
    params = jax.tree.map(lambda leaf: leaf, dense)
    for name, axes in channels.items():
        tiles = {1: 32} if name == "q" else {2: 8}
        array = qwix.quantize(
            dense["layers"][name]["kernel"],
            jnp.int4,
            channelwise_axes=axes,
            tiled_axes=tiles,
        )
        params["layers"][name] = {**params["layers"][name], "kernel": array}
    run = lambda params, x: jnp.sum(model.apply({"params": params}, x) ** 2)
    is_array = lambda leaf: isinstance(leaf, qwix.QArray)
    decoded = lambda leaf: qwix.dequantize(leaf) if is_array(leaf) else leaf
    dense = jax.tree.map(decoded, params, is_leaf=is_array)

    kernels = lorax.discover(run, ours.abstract(params), x)
    packed = ours.from_qarrays(params, kernels)
    leaf = packed["layers"]["o"]["kernel"]
    assert leaf.axes == lorax.Axes((1, 2), (3,), (0,)) and leaf.block == 8
    target = lorax.Target("all-linear", rank=2, init="gaussian")
    adapters, packed = lorax.init(jax.random.key(1), packed, target, kernels)
    assert len(adapters) == 2
    value, gradient = jax.value_and_grad(lorax.adapt(run))(adapters, packed, x)
    want, theirs = jax.value_and_grad(lorax.adapt(run))(adapters, dense, x)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    jax.tree.map(
        lambda g, t: np.testing.assert_allclose(g, t, atol=1e-4), gradient, theirs
    )
    plain = lorax.merge({}, packed)
    jax.tree.map(np.testing.assert_array_equal, plain, dense)


def test_the_wrapping_of_quantize_params():
    model, x = nn.Dense(32), normal(2, 64)
    dense = model.init(jax.random.key(0), x)["params"]
    rule = qwix.QuantizationRule(module_path=".*", weight_qtype=jnp.int8)
    small = qwix.quantize_model(model, qwix.PtqProvider([rule]))
    shapes = jax.eval_shape(small.init, jax.random.key(0), x)["params"]
    params = qwix.quantize_params(dense, shapes)
    assert ours.abstract(params)["kernel"].shape == (64, 32)
    found = ours.from_qarrays(params)
    assert found["bias"] is params["bias"]
    want = qwix.dequantize(params["kernel"].array)
    np.testing.assert_array_equal(dequantize(found["kernel"]), want)


def test_errors():
    array = qwix.quantize(normal(96, 24), **ROWS["int8"])
    stack = qwix.quantize(normal(2, 96, 24), jnp.int8)
    with pytest.raises(ValueError, match="a/w: the shape .2, 96, 24. does not show wh"):
        ours.from_qarrays({"a": {"w": stack}})
    run = lambda params, x: x @ params["w"]
    shapes = {"w": jax.ShapeDtypeStruct((96, 12), jnp.float32)}
    kernels = lorax.discover(run, shapes, normal(2, 96))
    with pytest.raises(ValueError, match="w: the QArray has shape .96, 24., but disc"):
        ours.from_qarrays({"w": array}, kernels)
    with pytest.raises(KeyError, match="no leaf 'v'"):
        ours.from_qarrays({"v": array}, kernels)
    other = dataclasses.replace(array, scale=array.scale[:, :7])
    with pytest.raises(ValueError, match="w: the QArray has codes of .* scale of sha"):
        ours.from_qarrays({"w": other})
    other = dataclasses.replace(array, scale=array.scale.at[0, 3].set(jnp.nan))
    with pytest.raises(ValueError, match="w: the QArray has scales that are NaN"):
        ours.from_qarrays({"w": other})


@pytest.mark.parametrize("pattern", ["w", "w/qvalue"])
def test_a_qarray_that_nobody_has_turned_into_a_leaf(pattern):
    params = {"w": qwix.quantize(normal(96, 24), **ROWS["int8"])}
    message = "w: a QArray of qwix.*lorax.interop.qwix.from_qarrays"
    with pytest.raises(ValueError, match=message):
        lorax.init(jax.random.key(0), params, [(pattern, 2)])
    with pytest.raises(ValueError, match=message):
        lorax.quantize(params, [(pattern, "int8")])
