"""What merging rounds away, against numpy."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import lorax
from tests import adapter_sets as make
from tests.programs import normal

AXES = lorax.Axes((0,), (1,))


def column(*values):
    """An adapter whose update is a column of these values."""
    a = jnp.array(values, jnp.float32)[:, None]
    return {"w": lorax.Lora(a, jnp.ones((1, 1)), 1.0, AXES)}


def test_by_hand():
    """bf16 near 1 is a grid of 1/128: 1 + 1/256 is a tie to even, 1 + 3/256 goes up."""
    params = {"w": jnp.ones((2, 1), jnp.bfloat16)}
    got = lorax.merge_report(column(1 / 256, 3 / 256), params)["w"]
    assert got.max == 1 / 256
    exact = np.array([1 + 1 / 256, 1 + 3 / 256])
    error = np.array([-1 / 256, 1 / 256])
    norm = np.linalg.norm
    np.testing.assert_allclose(got.relative, norm(error) / norm(exact), rtol=1e-12)
    np.testing.assert_allclose(got.lost, np.sqrt(2 / 10), rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("maker", [make.lora, make.adalora])
def test_the_error_of_the_merged_kernel(maker, dtype):
    shape = {"batch": (3,), "in_": (6,), "out": (2, 2)}
    adapter = maker(1, 2, 0.05, **shape)
    params = {"w": normal(2, 3, 6, 2, 2).astype(dtype)}
    got = lorax.merge_report({"w": adapter}, params)["w"]
    delta = make.delta(adapter)
    exact = np.asarray(params["w"], np.float64) + delta
    merged = np.asarray(lorax.merge({"w": adapter}, params)["w"], np.float64)
    error, norm = merged - exact, np.linalg.norm
    want = np.abs(error).max(), norm(error) / norm(exact), norm(error) / norm(delta)
    np.testing.assert_allclose(got, want, rtol=0.02 if dtype == jnp.float32 else 1e-4)
    ulp = {jnp.float32: 2**-24, jnp.bfloat16: 2**-8, jnp.float16: 2**-11}[dtype]
    assert 0 < got.relative < ulp


def test_every_class_and_a_narrower_dtype():
    adapters = {"d": make.dora(1), "f": lorax.Full(normal(2, 5))}
    params = {"d": normal(3, 6, 5), "f": normal(4, 5)}
    got = lorax.merge_report(adapters, params, dtype=jnp.bfloat16)
    for path, adapter in adapters.items():
        exact = np.asarray(adapter.merge(params[path]), np.float64)
        error = exact.astype(np.float32).astype(ml_dtypes.bfloat16) - exact
        lost = np.linalg.norm(error) / np.linalg.norm(exact - np.asarray(params[path]))
        np.testing.assert_allclose(got[path].lost, lost, rtol=1e-3)
        np.testing.assert_allclose(got[path].max, np.abs(error).max(), rtol=1e-3)


def test_no_update_loses_nothing_unless_the_base_is_rounded():
    params = {"w": jnp.full((2, 1), 1 + 2**-10)}
    assert lorax.merge_report(column(0.0, 0.0), params)["w"] == (0.0, 0.0, 0.0)
    got = lorax.merge_report(column(0.0, 0.0), params, jnp.bfloat16)["w"]
    assert got.max == 2**-10 and got.lost == np.inf


def test_the_smaller_the_update_the_more_is_lost():
    params = {"w": normal(1, 6, 5).astype(jnp.bfloat16)}
    lost = [
        lorax.merge_report({"w": make.lora(1, scale=scale)}, params)["w"].lost
        for scale in (1.0, 1e-2, 1e-5)
    ]
    assert lost[0] < 0.02 < lost[1] < 0.9 < lost[2] <= 1.0


QUANTISED = [
    ({"w": jnp.ones((6, 5), jnp.int8)}, "w: the base is quantised .int8"),
    ({"w": jnp.ones((6, 5), jnp.float8_e4m3fn)}, "w: the base is quantised .float8"),
    (
        {"w": {"qvalue": jnp.ones((6, 5), jnp.int8), "scale": jnp.ones(5)}},
        r"w \(stored as \['w/qvalue', 'w/scale'\]\): the base is quantised .int8",
    ),
]


@pytest.mark.parametrize("params,message", QUANTISED)
def test_a_quantised_base_is_refused(params, message):
    with pytest.raises(
        ValueError, match=message + ".*Quantized leaf, or dequantise the leaf.*"
    ):
        lorax.merge_report({"w": make.lora(1)}, params)


@pytest.mark.parametrize("name", ["int8", "int4", "nf4", "fp8"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_the_codes_of_a_quantised_base_lose(name, dtype):
    """No more than the whole update; passing a dtype means the dense merge."""
    dense = {"w": normal(2, 64, 5).astype(dtype)}
    params = lorax.quantize(dense, [("w", name)])
    adapter = make.lora(1, scale=0.05, in_=(64,))
    got = lorax.merge_report({"w": adapter}, params)["w"]
    merged = lorax.merge({"w": adapter}, params, requantize=True)["w"]
    update, norm = make.delta(adapter), np.linalg.norm
    exact = np.asarray(jnp.asarray(params["w"]), np.float64) + update
    error = np.asarray(jnp.asarray(merged), np.float64) - exact
    want = np.abs(error).max(), norm(error) / norm(exact), norm(error) / norm(update)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert 0.05 < got.lost < 1.01
    rounded = lorax.merge_report({"w": adapter}, params, dtype)["w"]
    assert rounded.lost < 0.5 * got.lost


def test_other_mistakes():
    params = {"w": normal(1, 6, 5)}
    with pytest.raises(ValueError, match="dtype=.*int8.*; give a floating dtype"):
        lorax.merge_report({"w": make.lora(1)}, params, jnp.int8)
    with pytest.raises(KeyError, match="no leaf 'v'"):
        lorax.merge_report({"v": make.lora(1)}, params)
    with pytest.raises(ValueError, match="w: the factors have shapes"):
        lorax.merge_report({"w": make.lora(1, in_=(7,))}, params)
    with pytest.raises(TypeError, match="is not an adapter"):
        lorax.merge_report(make.lora(1), params)
