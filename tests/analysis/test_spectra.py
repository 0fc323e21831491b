"""Spectra, subspaces and amplification against dense numpy decompositions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax import analysis

pytestmark = pytest.mark.once

AXES = lorax.Axes((0,), (1,))


def lora(seed, shape=(12, 9), rank=4, scale=0.7, batch=()):
    keys = jax.random.split(jax.random.key(seed), 2)
    n = len(batch)
    return lorax.Lora(
        jax.random.normal(keys[0], (*batch, shape[0], rank)),
        jax.random.normal(keys[1], (*batch, rank, shape[1])),
        scale,
        lorax.Axes((n,), (n + 1,), tuple(range(n))),
    )


def dense(adapter):
    a, b = np.float64(adapter.a), np.float64(adapter.b)
    return adapter.scale * a @ b


def test_singular_values_by_hand():
    a = jnp.array([[3.0, 0.0], [4.0, 0.0]])
    b = jnp.array([[0.0, 2.0, 0.0], [1.0, 1.0, 1.0]])
    values = analysis.singular_values({"w": lorax.Lora(a, b, 0.5, AXES)})["w"]
    np.testing.assert_allclose(values, [5.0, 0.0], atol=1e-6)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_singular_values_agree_with_numpy(batch):
    adapter = lora(0, batch=batch)
    values = analysis.singular_values({"w": adapter})["w"]
    want = np.linalg.svd(dense(adapter), compute_uv=False)[..., :4]
    np.testing.assert_allclose(values, want, rtol=1e-5, atol=1e-5)


def test_every_parametrisation_has_its_spectrum():
    params = {name: jax.random.normal(jax.random.key(1), (10, 3, 4)) for name in "xyz"}
    axes = lorax.Axes((0,), (1, 2))
    kernels = lorax.discover(
        lambda p, x: sum(jnp.einsum("bi,ijk->bjk", x, w).sum() for w in p.values()),
        params,
        jnp.ones((2, 10)),
    )
    targets = [
        lorax.Target("x", rank=2, adapter="adalora"),
        lorax.Target("y", rank=2, slices=(0, 2)),
        lorax.Target("z", rank=2, adapter="dora"),
    ]
    adapters, _ = lorax.init(jax.random.key(2), params, targets, kernels)
    assert adapters["x"].axes == axes
    noise = lambda path, leaf: (
        leaf
        + jax.random.normal(jax.random.key(len(jax.tree_util.keystr(path))), leaf.shape)
    )
    adapters = jax.tree_util.tree_map_with_path(noise, adapters)
    values = analysis.singular_values(adapters)
    for path in "xy":
        delta = np.float64(adapters[path].delta(params[path])).reshape(10, 12)
        want = np.linalg.svd(delta, compute_uv=False)[: len(values[path])]
        np.testing.assert_allclose(values[path], want, rtol=2e-5, atol=1e-5)
    assert len(values["y"]) == 4  # two slices of rank 2
    z = adapters["z"]
    flat = np.float64(z.a) @ np.float64(z.b).reshape(2, 12) * z.scale
    want = np.linalg.svd(flat, compute_uv=False)[:2]
    np.testing.assert_allclose(values["z"], want, rtol=2e-5)


def test_ranks_and_energy_by_hand():
    values = jnp.array([[4.0, 2.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    p = np.array([2 / 3, 1 / 3])
    first = np.exp(-(p * np.log(p)).sum())
    np.testing.assert_allclose(
        analysis.effective_rank(values), [first, 0.0, 3.0], rtol=1e-6
    )
    np.testing.assert_allclose(analysis.stable_rank(values), [1.25, 0.0, 3.0])
    want = [[0.8, 1, 1], [0, 0, 0], [1 / 3, 2 / 3, 1]]
    np.testing.assert_allclose(analysis.energy(values), want, rtol=1e-6)


def test_large_and_small_values_stay_in_range():
    values = jnp.array([1e25, 1e25]), jnp.array([1e-25, 1e-25])
    for v in values:
        assert float(analysis.stable_rank(v)) == 2.0
        assert float(analysis.energy(v)[0]) == 0.5


def test_metrics_in_a_jitted_step():
    adapters = {
        "x": lora(0),
        "y": lora(1),
        "zero": lora(2).replace(b=jnp.zeros((4, 9))),
    }
    found = jax.jit(analysis.metrics)(adapters)
    s = [np.linalg.svd(dense(adapters[p]), compute_uv=False)[:4] for p in "xy"]
    norm = np.sqrt(sum((v**2).sum() for v in s))
    np.testing.assert_allclose(found["update_norm"], norm, rtol=1e-5)
    np.testing.assert_allclose(found["spectral_norm"], max(map(max, s)), rtol=1e-5)
    stable = sum((v**2).sum() / v[0] ** 2 for v in s) / 3  # the third is zero
    np.testing.assert_allclose(found["stable_rank"], stable, rtol=1e-5)
    assert all(value.shape == () for value in found.values())


def directions(matrix, side):
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    return u if side == "in" else vt.T


@pytest.mark.parametrize("of", ["a", "b", "in", "out"])
def test_similarity_agrees_with_numpy(of):
    one, other = lora(0, rank=3), lora(1, rank=5)
    phi = analysis.subspace_similarity({"w": one}, {"w": other, "v": one}, of)["w"]
    pick = {
        "a": lambda x: directions(np.float64(x.a), "in"),
        "b": lambda x: directions(np.float64(x.b), "out"),
        "in": lambda x: directions(dense(x), "in"),
        "out": lambda x: directions(dense(x), "out"),
    }[of]
    u, v = pick(one)[:, :3], pick(other)[:, :5]
    for i in range(1, 4):
        for j in range(1, 6):
            want = np.linalg.norm(u[:, :i].T @ v[:, :j]) ** 2 / min(i, j)
            np.testing.assert_allclose(phi[i - 1, j - 1], want, atol=1e-5)


def test_similarity_with_oneself_and_at_random():
    adapter = lora(0, (64, 48), batch=(2,))
    phi = analysis.subspace_similarity({"w": adapter}, {"w": adapter})["w"]
    assert phi.shape == (2, 4, 4)
    np.testing.assert_allclose(jnp.diagonal(phi, axis1=1, axis2=2), 1.0, rtol=1e-5)
    many = lora(1, (64, 48), batch=(200,)), lora(2, (64, 48), batch=(200,))
    phi = analysis.subspace_similarity({"w": many[0]}, {"w": many[1]})["w"]
    want = analysis.random_similarity(64, 4, 4)
    np.testing.assert_allclose(phi[:, 3, 3].mean(), want, rtol=0.1)


@pytest.mark.parametrize("rank", [None, 2])
def test_amplification_agrees_with_numpy(rank):
    adapter = lora(0, (20, 16))
    kernel = jax.random.normal(jax.random.key(3), (20, 16))
    found = analysis.amplification(
        jax.random.key(0), {"w": adapter}, {"w": kernel}, rank
    )["w"]
    k, w = rank or 4, np.float64(kernel)
    u, s, vt = np.linalg.svd(dense(adapter))
    projected = np.linalg.norm(u[:, :k].T @ w @ vt[:k].T)
    np.testing.assert_allclose(found.update, np.linalg.norm(s[:k]), rtol=1e-5)
    np.testing.assert_allclose(found.projected, projected, rtol=1e-5)
    np.testing.assert_allclose(found.factor, np.linalg.norm(s[:k]) / projected, 2e-5)
    own = np.linalg.svd(w, compute_uv=False)[:k]
    np.testing.assert_allclose(found.own, np.linalg.norm(own), rtol=1e-5)
    np.testing.assert_allclose(found.kernel, np.linalg.norm(w), rtol=1e-6)
    assert 0 < float(found.random) < float(found.own)


def test_amplification_of_a_layer_subset_reads_its_layers():
    kernel = jax.random.normal(jax.random.key(3), (3, 20, 16))
    adapter = lora(0, (20, 16), batch=(2,)).replace(layers=(0, 2))
    key = jax.random.key(0)
    both = analysis.amplification(key, {"w": adapter}, {"w": kernel})["w"]
    plain = adapter.replace(layers=None)
    want = analysis.amplification(key, {"w": plain}, {"w": kernel[jnp.array([0, 2])]})
    np.testing.assert_allclose(both.projected, want["w"].projected, rtol=1e-5)


def test_errors_teach():
    full = {"w": lorax.Full(jnp.ones((3, 2)))}
    with pytest.raises(ValueError, match="low-rank factors, but was given Full"):
        analysis.singular_values(full)
    with pytest.raises(ValueError, match="an empty tree"):
        analysis.metrics({})
    one, other = {"x": lora(0)}, {"y": lora(0)}
    with pytest.raises(ValueError, match="no path in common.*'y'"):
        analysis.subspace_similarity(one, other)
    with pytest.raises(ValueError, match="of='c'; choose one of a, b"):
        analysis.subspace_similarity(one, one, "c")
    with pytest.raises(ValueError, match="fit the same kernel"):
        analysis.subspace_similarity(one, {"x": lora(0, (10, 9))})
    with pytest.raises(ValueError, match="rank=0"):
        analysis.amplification(jax.random.key(0), one, {"x": jnp.ones((12, 9))}, 0)
    with pytest.raises(ValueError, match="made for another model"):
        analysis.amplification(jax.random.key(0), one, {"x": jnp.ones((12, 8))})
    with pytest.raises(ValueError, match="made for another model"):
        analysis.intruder_dimensions(jax.random.key(0), one, {"x": jnp.ones((12, 8))})
    with pytest.raises(KeyError, match="no leaf 'x'"):
        analysis.amplification(jax.random.key(0), one, {"w": jnp.ones((12, 9))})
