"""Adapters extracted from two checkpoints."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax import compose
from tests import adapter_sets as make
from tests.programs import normal, perturbed

PARAMS = {
    "w": normal(1, 6, 5),
    "stack": normal(2, 3, 5, 5),
    "conv": normal(3, 3, 5, 4),
    "bias": normal(4, 4),
}


def fn(params, x):
    layer = lambda x, w: (jnp.tanh(x @ w), None)
    x = jax.lax.scan(layer, x @ params["w"], params["stack"])[0]
    numbers = ("NHC", "HIO", "NHC")
    y = jax.lax.conv_general_dilated(
        x, params["conv"], (1,), "SAME", dimension_numbers=numbers
    )
    return y + params["bias"]


FULL = lorax.Target("bias", adapter="full")
LOW = functools.partial(lorax.Target, "w|stack|conv", rank=2, alpha=3)


@functools.cache
def kernels():
    return lorax.discover(fn, PARAMS, normal(5, 2, 7, 6))


@functools.cache
def trained(adapter, layers=None):
    """Perturbed adapters of rank 2, and the targets that made them."""
    low = LOW(adapter=adapter)
    targets = [FULL, low]
    if layers:
        targets.insert(0, lorax.Target("stack", 2, 3, adapter=adapter, layers=layers))
    adapters, _ = lorax.init(jax.random.key(0), PARAMS, targets, kernels())
    return targets, perturbed(adapters)


@pytest.mark.parametrize(
    "kind,layers",
    [("lora", None), ("lora", (0, 2)), ("adalora", None), ("dora", (0, 2))],
)
def test_extract_gives_back_what_was_merged(kind, layers):
    targets, adapters = trained(kind, layers)
    tuned = lorax.merge(adapters, PARAMS)
    got, error = compose.extract(PARAMS, tuned, targets, kernels())
    assert got.keys() == adapters.keys() == error.keys()
    for path, adapter in got.items():
        assert type(adapter) is type(adapters[path])
        if kind != "dora" or path == "bias":  # Dora's change has the kernel's full rank
            make.close(adapter.merge(PARAMS[path]), tuned[path])
            assert float(error[path]) < 1e-5
    if kind == "lora":
        make.close(got["w"].delta(PARAMS["w"]), make.delta(adapters["w"]))
        assert got["w"].scale == 1.5


def test_a_dora_of_full_rank_is_the_tuned_kernel():
    tuned = {"w": PARAMS["w"] + normal(9, 6, 5)}
    target = lorax.Target("w", rank=5, adapter="dora")
    got, error = compose.extract({"w": PARAMS["w"]}, tuned, target)
    make.close(got["w"].merge(PARAMS["w"]), tuned["w"])
    norm = np.linalg.norm(np.asarray(tuned["w"], np.float64), axis=0)
    make.close(got["w"].magnitude, norm)
    assert float(error["w"]) < 1e-5


def test_a_smaller_rank_is_the_best_approximation_of_the_change():
    change = normal(9, 6, 5)
    tuned = PARAMS | {"w": PARAMS["w"] + change}
    got, error = compose.extract(PARAMS, tuned, lorax.Target("w", rank=2))
    want, lost = best(np.asarray(change, np.float64), 2)
    make.close(make.delta(got["w"]), want)
    np.testing.assert_allclose(error["w"], lost, rtol=1e-4)
    half = compose.extract(PARAMS, tuned, lorax.Target("w", 2, dtype=jnp.bfloat16))
    assert half.adapters["w"].a.dtype == jnp.bfloat16
    miss = np.linalg.norm(make.delta(half.adapters["w"]) - np.asarray(change))
    np.testing.assert_allclose(
        half.error["w"], miss / np.linalg.norm(change), rtol=1e-3
    )


def best(matrix, rank):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    part = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return part, np.linalg.norm(matrix - part) / np.linalg.norm(matrix)


def test_dora_by_way_of_its_merged_kernel_joins_a_combination():
    """What the error about Dora suggests."""
    dora, lora = {"w": make.dora(1)}, {"w": make.lora(2)}
    params = {"w": PARAMS["w"]}
    tuned = lorax.merge(dora, params)
    plain, error = compose.extract(params, tuned, lorax.Target("w", rank=5))
    assert float(error["w"]) < 1e-5
    adapters, _ = compose.combine([plain, lora], [1, 1])
    want = tuned["w"] + make.delta(lora["w"])
    make.close(lorax.merge(adapters, params)["w"], want)


def test_bf16_checkpoints_and_no_change_at_all():
    half = {"w": PARAMS["w"].astype(jnp.bfloat16)}
    tuned = {"w": (PARAMS["w"] + 0.25).astype(jnp.bfloat16)}
    got, error = compose.extract(half, tuned, lorax.Target("w", rank=5))
    want = np.asarray(tuned["w"], np.float64) - np.asarray(half["w"], np.float64)
    make.close(make.delta(got["w"]), want)
    np.testing.assert_array_equal(lorax.merge(got, half)["w"], tuned["w"])
    same, error = compose.extract(half, half, lorax.Target("w", rank=2))
    assert not make.delta(same["w"]).any() and float(error["w"]) == 0


def test_checkpoints_of_different_models():
    call = functools.partial(compose.extract, PARAMS, targets=lorax.Target("w", 2))
    with pytest.raises(ValueError, match=r"w: params has shape \(6, 5\) and tuned"):
        call(tuned={"w": jnp.ones((5, 6))})
    with pytest.raises(KeyError, match="tuned tree has no leaf 'w'"):
        call(tuned={"v": jnp.ones((6, 5))})
    with pytest.raises(ValueError, match="matches no leaf"):
        compose.extract(PARAMS, PARAMS, lorax.Target("nothing"))
