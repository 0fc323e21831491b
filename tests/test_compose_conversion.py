"""Adapters converted: scaled, resized, to plain Lora, from two checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax import compose, linalg
from tests import adapter_sets as make
from tests.programs import normal

CONV = {"in_": (3, 4), "out": (5,)}
STACK = {"batch": (3,), "in_": (6,), "out": (2, 2)}
SHAPES = {"matrix": {}, "conv": CONV, "stack": STACK}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def matrices(delta, shape):
    """`[*batch, in, out]`."""
    n, i = len(shape.get("batch", ())), len(shape.get("in_", (0,)))
    rows = int(np.prod(delta.shape[n : n + i]))
    return delta.reshape(*delta.shape[:n], rows, -1)


def best(matrix, rank):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    part = (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]
    return part, np.linalg.norm(matrix - part) / np.linalg.norm(matrix)


@pytest.mark.parametrize("n,rank,m", [(6, 2, 5), (3, 4, 7), (7, 4, 2), (4, 1, 4)])
def test_low_rank_svd_is_the_svd_of_the_product(n, rank, m):
    a, b = normal(1, 2, n, rank), normal(2, 2, rank, m)
    u, s, vt = linalg.low_rank_svd(a, b)
    k = min(n, rank, m)
    assert (u.shape, s.shape, vt.shape) == ((2, n, k), (2, k), (2, k, m))
    product = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    make.close(s, np.linalg.svd(product, compute_uv=False)[..., :k])
    make.close(np.asarray(u * s[:, None]) @ np.asarray(vt), product)
    for q in (u, np.swapaxes(vt, -1, -2)):
        make.close(np.einsum("bik,bij->bkj", q, q), np.stack([np.eye(k)] * 2))
    largest = np.take_along_axis(np.asarray(u), np.abs(u).argmax(1)[:, None], 1)
    assert (largest > 0).all()


def test_low_rank_svd_of_nothing_and_of_bf16():
    u, s, vt = linalg.low_rank_svd(normal(1, 4, 2), jnp.zeros((2, 3)))
    assert not s.any() and np.isfinite(u).all() and np.isfinite(vt).all()
    half = linalg.low_rank_svd(normal(1, 4, 2).astype(jnp.bfloat16), normal(2, 2, 3))
    assert {x.dtype for x in half} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("maker", [make.lora, make.adalora])
def test_scale_and_negate_are_exact(maker):
    adapters = {"w": maker(1)}
    for got, factor in [
        (compose.scale(adapters, 0.5), 0.5),
        (compose.negate(adapters), -1),
    ]:
        np.testing.assert_array_equal(
            make.delta(got["w"]), factor * make.delta(adapters["w"])
        )
        jax.tree.map(
            np.testing.assert_array_equal,
            jax.tree.leaves(got),
            jax.tree.leaves(adapters),
        )
    base = {"w": normal(2, 6, 5)}
    there = lorax.merge(adapters, base)
    make.close(lorax.merge(compose.negate(adapters), there)["w"], base["w"], 1e-6)


@pytest.mark.parametrize(
    "adapter,message",
    [
        (make.dora(1), r"scale needs updates.*\['w'\] are Dora.*extract"),
        (lorax.Full(jnp.ones(3)), r"\['w'\] are Full.*combine\(\[adapters\], \[2"),
    ],
)
def test_scale_refuses_what_has_no_update_to_scale(adapter, message):
    with pytest.raises(ValueError, match=message):
        compose.scale({"w": adapter}, 2.0)


@pytest.mark.parametrize("factor", [np.nan, "2", jnp.ones(())])
def test_a_factor_is_a_finite_number(factor):
    with pytest.raises(ValueError, match="factor=.*finite Python number"):
        compose.scale({"w": make.lora(1)}, factor)


@shapes
@pytest.mark.parametrize("maker", [make.lora, make.adalora])
def test_a_smaller_rank_is_the_best_approximation(maker, shape):
    adapter = maker(1, 4, 1.5, **shape)
    (got, error), whole = compose.resize({"w": adapter}, 2), make.delta(adapter)
    want, lost = best(matrices(whole, shape), 2)
    make.close(make.delta(got["w"]), want.reshape(whole.shape))
    np.testing.assert_allclose(error["w"], lost, rtol=1e-4)
    assert type(got["w"]) is type(adapter) and got["w"].rank == 2
    assert got["w"].scale == adapter.scale and lost > 0.01
    got["w"].check("w", jnp.zeros(whole.shape))


def test_factors_come_out_balanced():
    got, _ = compose.resize({"w": make.lora(1, 4)}, 3)
    a, b = got["w"].a, got["w"].b
    make.close(np.asarray(a.T @ a), np.asarray(b @ b.T))


@shapes
@pytest.mark.parametrize("maker", [make.lora, make.adalora, make.dora])
def test_a_larger_rank_is_exact(maker, shape):
    adapter = maker(1, 2, 1.5, **shape)
    got, error = compose.resize({"w": adapter}, 4)
    assert got["w"].rank == 4 and float(error["w"]) == 0
    base = normal(5, *make.delta(adapter).shape)
    make.close(got["w"].merge(base), adapter.merge(base), 1e-6)


def test_resize_of_dora_full_layers_and_bf16():
    layered = make.lora(2, 3, batch=(2,), layers=(0, 3))
    half = jax.tree.map(lambda v: v.astype(jnp.bfloat16), make.lora(3, 3))
    adapters = {"d": make.dora(1, 3), "f": lorax.Full(jnp.ones(3)), "l": layered}
    adapters["h"] = half
    got, error = compose.resize(adapters, 2)
    np.testing.assert_array_equal(got["d"].magnitude, adapters["d"].magnitude)
    assert got["f"] is adapters["f"] and float(error["f"]) == 0
    assert got["l"].layers == (0, 3)
    make.close(make.delta(got["l"]), best(make.delta(layered), 2)[0])
    assert got["h"].a.dtype == jnp.bfloat16
    miss = np.linalg.norm(make.delta(got["h"]) - make.delta(half))
    lost = miss / np.linalg.norm(make.delta(half))  # including the cast
    np.testing.assert_allclose(error["h"], lost, rtol=1e-3)
    assert all(a.rank == 2 for p, a in got.items() if p != "f")


def test_a_fresh_adapter_stays_trainable():
    """b = 0: a must not be cut to zero too, or no gradient would ever come back."""
    fresh = make.lora(1, 4)
    got, error = compose.resize({"w": fresh.replace(b=0 * fresh.b)}, 2)
    assert float(error["w"]) == 0 and not got["w"].b.any()
    make.close(np.linalg.norm(got["w"].a, axis=0), np.ones(2))


@pytest.mark.parametrize("rank", [0, 6, 2.0])
def test_a_rank_that_does_not_fit(rank):
    with pytest.raises(ValueError, match=rf"w: rank={rank} .*whole number from 1 to 5"):
        compose.resize({"w": make.lora(1)}, rank)


def test_to_lora_of_each_class():
    adapters = {"w": make.adalora(1), "v": make.lora(2), "f": lorax.Full(jnp.ones(3))}
    got = compose.to_lora(adapters)
    assert type(got["w"]) is lorax.Lora
    make.close(make.delta(got["w"]), make.delta(adapters["w"]), 1e-6)
    assert got["v"] is adapters["v"] and got["f"] is adapters["f"]
    with pytest.raises(ValueError, match=r"\['d'\] are Dora, whose updates cannot be"):
        compose.to_lora({"d": make.dora(1)})


def pissa(kernel, rank, scale):
    """The principal part of the kernel as factors, and the residual, in numpy."""
    u, s, vt = np.linalg.svd(np.asarray(kernel, np.float64), full_matrices=False)
    root = np.sqrt(s[..., :rank] / scale)
    a = (u[..., :rank] * root[..., None, :]).astype(np.float32)
    b = (root[..., None] * vt[..., :rank, :]).astype(np.float32)
    return jnp.asarray(a), jnp.asarray(b), jnp.asarray(kernel - scale * (a @ b))


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("scale", [1.5, 0.5])
def test_an_adapter_on_a_residual_base_runs_on_the_original_one(scale, batch):
    params = {"w": normal(1, *batch, 6, 5), "v": normal(2, 6, 5)}
    a, b, rest = pissa(params["w"], 2, scale)
    first = make.lora(3, 2, scale, batch=batch).replace(a=a, b=b)
    plain = make.lora(4)
    plain = plain.replace(b=0 * plain.b)  # a standard init beside it
    moved, initial = params | {"w": rest}, {"w": first, "v": plain}
    adapters = jax.tree.map(lambda v: v + 0.1 * normal(v.size, *v.shape), initial)
    got = compose.to_lora(adapters, initial)
    assert got["w"].rank == 4 and got["w"].scale == scale
    assert got["v"].rank == 2
    fn = lambda params, x: x @ params["w"] @ params["w"].mT @ params["v"]
    x = normal(5, *batch, 7, 6)
    want = fn(lorax.merge(adapters, moved), x)
    make.close(lorax.adapt(fn)(got, params, x), want)
    wrong = fn(lorax.merge(adapters, params), x)
    assert np.abs(wrong - want).max() > 0.1 * np.abs(want).max()


def test_an_embedding_at_its_standard_init_moved_nothing():
    first = make.lora(1)
    first = first.replace(a=0 * first.a)
    assert compose.to_lora({"w": make.lora(2)}, {"w": first})["w"].rank == 2


@pytest.mark.parametrize(
    "initial,message",
    [
        ({"v": make.lora(1)}, r"initial has no adapter for \['w'\]"),
        ({"w": make.lora(1, out=(4,))}, r"w: the adapter has .*initial.*out \(4,\)"),
        ({"w": make.dora(1)}, r"to_lora\(initial=\) needs.*Dora"),
    ],
)
def test_an_initial_of_other_adapters(initial, message):
    with pytest.raises(ValueError, match=message):
        compose.to_lora({"w": make.lora(2)}, initial)
