"""The formats compared with libraries that have them: qwix and bitsandbytes."""

import jax.numpy as jnp
import numpy as np
import pytest

from lorax.quantized import NF4, Fp8, Int4, Int8, dequantize
from lorax.types import Axes
from tests.quantized.matrices import codes_of, normal

PLAIN = Axes((0,), (1,))
GROUPS = {"channelwise_axes": [1], "tiled_axes": {0: 64}}
QWIX = {
    "int8": (Int8(), {"qtype": jnp.int8, "channelwise_axes": [1]}),
    "int8 in groups": (Int8(group=64), {"qtype": jnp.int8, **GROUPS}),
    "int4": (Int4(), {"qtype": jnp.int4, **GROUPS}),
    "int4 asymmetric": (
        Int4(symmetric=False),
        {"qtype": jnp.int4, "calibration_method": "minmax", **GROUPS},
    ),
    "fp8": (Fp8(), {"qtype": jnp.float8_e4m3fn, "channelwise_axes": [1]}),
    "nf4": (NF4(double=False), {"qtype": "nf4", **GROUPS}),
}


@pytest.mark.parametrize("name", QWIX)
def test_the_arrays_of_qwix(name):
    qwix = pytest.importorskip("qwix", reason="needs the golden extra")
    form, options = QWIX[name]
    kernel = jnp.asarray(normal(256, 48))
    ours, theirs = form.quantize(kernel, PLAIN), qwix.quantize(kernel, **options)
    codes = np.asarray(theirs.qvalue)
    if ours.block:  # in two's complement
        codes = codes.astype(int) % 16
    np.testing.assert_array_equal(codes_of(ours), codes)
    np.testing.assert_array_equal(ours.scales, theirs.scale)
    if theirs.zero_point is not None:
        np.testing.assert_array_equal(ours.zeros, theirs.zero_point)
    np.testing.assert_array_equal(dequantize(ours), qwix.dequantize(theirs))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("inputs, outputs", [(128, 48), (576, 1536), (640, 200)])
def test_nf4_of_bitsandbytes(inputs, outputs, dtype):
    torch = pytest.importorskip("torch", reason="needs the golden extra")
    functional = pytest.importorskip(
        "bitsandbytes.functional", reason="needs the golden extra"
    )
    weight = torch.tensor(normal(outputs, inputs) * 0.02).to(getattr(torch, dtype))
    packed, state = functional.quantize_4bit(
        weight, quant_type="nf4", blocksize=64, compress_statistics=True
    )
    flat = packed.numpy().ravel()
    codes = np.stack([flat >> 4, flat & 15], 1).reshape(outputs, inputs)
    kernel = jnp.asarray(weight.float().numpy().T).astype(dtype)
    leaf = NF4().quantize(kernel, PLAIN)
    np.testing.assert_array_equal(codes_of(leaf), codes.T)
    # their CPU kernel finds a scale's code in a table of rounded values, so one in some
    # hundreds is the neighbouring code, or among the finest codes a few further
    scales = state.absmax.numpy().reshape(outputs, -1).T
    apart = np.abs(np.asarray(leaf.scales.codes, int) - scales.astype(int))
    assert (apart > 0).mean() < 0.02 and apart.max() <= 4
    np.testing.assert_allclose(leaf.scales.absmax, state.state2.absmax, rtol=1e-6)
    np.testing.assert_allclose(leaf.scales.offset, float(state.offset), rtol=1e-6)
    theirs = functional.dequantize_4bit(packed, state).float()
    same = np.repeat(apart == 0, 64, axis=0)
    ours = np.asarray(dequantize(leaf)).astype(np.float32)
    # their table differs by one rounding, and bfloat16 rounds the product
    rtol = 1e-6 if dtype == "float32" else 2.0**-7
    np.testing.assert_allclose(ours[same], theirs.numpy().T[same], rtol=rtol)
