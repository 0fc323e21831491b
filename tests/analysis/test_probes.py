"""Intruders, random subspaces, maps and costs; and that analysis stays low-rank."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax
from lorax import analysis, linalg, optim
from lorax.types import Factors

pytestmark = pytest.mark.once

AXES = lorax.Axes((0,), (1,))


def with_spectrum(seed, shape, values):
    keys = jax.random.split(jax.random.key(seed), 2)
    u, v = (
        jnp.linalg.qr(jax.random.normal(k, (n, len(values))))[0]
        for k, n in zip(keys, shape)
    )
    return u @ jnp.diag(jnp.asarray(values)) @ v.T


def test_randomized_svd_of_a_sum_never_formed():
    keys = jax.random.split(jax.random.key(0), 4)
    w = with_spectrum(1, (30, 20), 0.5 ** jnp.arange(20))
    a, b = jax.random.normal(keys[1], (30, 2)), jax.random.normal(keys[2], (2, 20))
    gain = jax.random.uniform(keys[3], (20,), minval=0.5, maxval=1.5)
    u, s, vt = linalg.randomized_svd(
        keys[0], w, 3, iterations=8, factors=Factors(a, b, gain)
    )
    whole = (np.float64(w) + np.float64(a) @ np.float64(b)) * np.float64(gain)
    want = np.linalg.svd(whole, compute_uv=False)[:3]
    np.testing.assert_allclose(s, want, rtol=1e-5)
    np.testing.assert_allclose(jnp.abs(jnp.sum((u.T @ whole) * vt, 1)), want, rtol=1e-5)


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("against", [None, 24])
def test_intruders_agree_with_numpy(side, against):
    values = 0.8 ** jnp.arange(24)
    kernel = with_spectrum(0, (32, 24), values)
    keys = jax.random.split(jax.random.key(5), 2)
    a = jnp.linalg.qr(jax.random.normal(keys[0], (32, 2)))[0]
    b = jnp.linalg.qr(jax.random.normal(keys[1], (24, 2)))[0].T
    adapter = lorax.Lora(a * jnp.array([3.0, 0.02]), b, 1.0, AXES)
    found = analysis.intruder_dimensions(
        jax.random.key(0), {"w": adapter}, {"w": kernel},
        k=5, threshold=0.6, against=against, side=side,
    )["w"]  # fmt: skip
    tuned = np.float64(kernel) + np.float64(adapter.a) @ np.float64(adapter.b)
    pick = lambda m: (
        np.linalg.svd(m)[0][:, :24] if side == "in" else np.linalg.svd(m)[2].T
    )
    cosines = np.abs(pick(tuned)[:, :5].T @ pick(np.float64(kernel))).max(1)
    np.testing.assert_allclose(found.cosines, cosines, atol=1e-5)
    assert int(found.number) == (cosines < 0.6).sum() > 0


def test_intruders_of_a_stack_and_with_magnitudes():
    params = {"w": jax.random.normal(jax.random.key(0), (3, 12, 10)) / 3}
    kernels = lorax.discover(
        lambda p, x: jax.lax.scan(lambda c, w: ((c @ w) @ w.T, None), x, p["w"])[
            0
        ].sum(),
        params,
        jnp.ones((2, 12)),
    )
    target = lorax.Target("w", rank=2, adapter="dora")
    adapters, _ = lorax.init(jax.random.key(1), params, target, kernels)
    still = analysis.intruder_dimensions(jax.random.key(2), adapters, params, k=2)["w"]
    assert still.number.shape == (3,) and still.cosines.shape == (3, 2)
    np.testing.assert_allclose(still.cosines, 1.0, atol=1e-3)  # nothing has moved
    moved = adapters["w"].replace(
        b=5 * jax.random.normal(jax.random.key(3), adapters["w"].b.shape),
        magnitude=adapters["w"].magnitude * jnp.linspace(0.5, 2, 10),
    )
    found = analysis.intruder_dimensions(
        jax.random.key(2), {"w": moved}, params, k=2, threshold=0.9
    )["w"]
    for i in range(3):
        base, tuned = (
            np.float64(params["w"][i]),
            np.float64(moved.merge(params["w"])[i]),
        )
        u, v = np.linalg.svd(base)[2].T, np.linalg.svd(tuned)[2].T
        want = np.abs(v[:, :2].T @ u).max(1)
        np.testing.assert_allclose(found.cosines[i], want, atol=1e-5)


def test_intruders_of_an_update_that_is_a_map():
    params = {"w": jax.random.normal(jax.random.key(0), (12, 10)) / 3}
    target = lorax.Target("w", rank=2, adapter="lokr")
    adapters, _ = lorax.init(jax.random.key(1), params, target)
    moved = adapters["w"].replace(
        w1=jax.random.normal(jax.random.key(2), adapters["w"].w1.shape)
    )
    found = analysis.intruder_dimensions(
        jax.random.key(3), {"w": moved}, params, k=2, threshold=0.9
    )["w"]
    base, tuned = np.float64(params["w"]), np.float64(moved.merge(params["w"]))
    u, v = np.linalg.svd(base)[2].T, np.linalg.svd(tuned)[2].T
    want = np.abs(v[:, :2].T @ u).max(1)
    assert want.min() < 0.99  # it has moved
    np.testing.assert_allclose(found.cosines, want, atol=1e-5)


def test_a_random_subspace_is_isometric_and_whole():
    params = {
        "w": jnp.ones((7, 5)),
        "b": jnp.zeros(5, jnp.bfloat16),
        "n": jnp.arange(3),
    }
    space = analysis.random_subspace(jax.random.key(0), params, 6)
    p = np.zeros((40, 6))
    at = 0
    for path in space.coordinate:
        j, w = np.ravel(space.coordinate[path]), np.ravel(space.weight[path])
        p[np.arange(at, at + len(j)), j] = w
        at += len(j)
    np.testing.assert_allclose(p.T @ p, np.eye(6), atol=1e-6)
    z = jnp.arange(6.0)
    moved = space.expand(params, z)
    want = np.ones(35) + p[5:] @ np.arange(6.0)  # in tree order b comes first
    assert list(space.coordinate) == ["b", "w"]
    np.testing.assert_allclose(np.ravel(moved["w"]), want, rtol=1e-6)
    assert moved["b"].dtype == jnp.bfloat16 and moved["n"] is params["n"]


def test_the_probe_finds_a_planted_dimension():
    # a loss that depends on k numbers of theta needs about k random coordinates
    keys = jax.random.split(jax.random.key(0), 3)
    features = jax.random.normal(keys[0], (8, 200)) / math.sqrt(200)
    goal = jax.random.normal(keys[1], (8,))
    loss = lambda theta: jnp.mean((features @ theta["w"] - goal) ** 2)
    params = {"w": jnp.zeros(200)}

    def trained(d):
        space = analysis.random_subspace(keys[2], params, d)
        tx = optax.adam(0.3)

        def step(carry, _):
            z, state = carry
            grads = jax.grad(lambda z: loss(space.expand(params, z)))(z)
            updates, state = tx.update(grads, state)
            return (z + updates, state), None

        z = jnp.zeros(d)
        z = jax.lax.scan(step, (z, tx.init(z)), None, length=1500)[0][0]
        return float(loss(space.expand(params, z)))

    dimensions = (2, 4, 8, 16)
    losses = [trained(d) for d in dimensions]
    start = float(loss(params))
    assert losses[-1] < 1e-2 * start < losses[0]
    assert analysis.intrinsic_dimension(dimensions, losses, start, 0.0) in (8, 16)


def test_intrinsic_dimension_by_hand():
    of = analysis.intrinsic_dimension
    assert of((100, 10), (0.9, 0.8), start=0.0, full=1.0) == 100
    assert of((10, 100), (0.5, 0.8), start=0.0, full=1.0) is None
    assert of((10, 100), (2.05, 1.0), start=3.0, full=2.0) == 10  # a loss that falls
    with pytest.raises(ValueError, match="no gain"):
        of((1,), (1.0,), 1.0, 1.0)
    with pytest.raises(ValueError, match="2 dimensions and 1 scores"):
        of((1, 2), (1.0,), 0.0, 1.0)
    with pytest.raises(ValueError, match="from 1 to 6"):
        analysis.random_subspace(jax.random.key(0), {"w": jnp.ones((3, 2))}, 7)


def test_maps():
    values = {
        "h_10/q/kernel": 1, "h_2/q/kernel": jnp.int32(3),
        "layers/2/mlp/up/kernel": 5, "block/o/kernel": jnp.array([7, 8, 9]), "head": 2,
    }  # fmt: skip
    found = analysis.layer_map(values)
    assert found.matrices == ("h/q", "layers/mlp/up", "block/o", "head")
    assert found.layers == (0, 1, 2, 10)
    want = [
        [np.nan, np.nan, 3, 1], [np.nan, np.nan, 5, np.nan],
        [7, 8, 9, np.nan], [2, np.nan, np.nan, np.nan],
    ]  # fmt: skip
    np.testing.assert_array_equal(found.values, want)
    with pytest.raises(ValueError, match="one value per layer"):
        analysis.layer_map({"w": np.ones((2, 3))})
    with pytest.raises(ValueError, match="already a value for 'h/q' in layer 2"):
        analysis.layer_map({"h_2/q/kernel": 1, "h.2/q": 1})


def test_the_rank_map_of_adalora():
    params = {f"h_{i}": {n: jnp.eye(4) for n in "qv"} for i in range(2)}
    target = lorax.Target(".*", rank=2, adapter="adalora")
    adapters, _ = lorax.init(jax.random.key(0), params, target)
    tx = optim.adalora(
        optax.sgd(0.1), target_budget=4, total_steps=10, initial_warmup=1, final_steps=2
    )
    ranks = optim.adalora_effective_ranks(tx.init(adapters))
    found = analysis.layer_map(ranks)
    assert found.matrices == ("h/q", "h/v") and found.layers == (0, 1)
    np.testing.assert_array_equal(found.values, 2 * np.ones((2, 2)))


def gpt3():
    """The attention and feed-forward kernels of 175 billion parameters, by shape."""
    shapes = {n: (96, 12288, 12288) for n in "qkvo"}
    shapes |= {"up": (96, 12288, 4 * 12288), "down": (96, 4 * 12288, 12288)}
    shapes |= {"embedding": (50257 + 2048, 12288)}
    return {n: jax.ShapeDtypeStruct(s, jnp.float16) for n, s in shapes.items()}


def test_the_claims_for_gpt3():
    params = gpt3()
    uses = {n: jax.ShapeDtypeStruct((2, 12288), jnp.float16) for n in "qv"}

    def forward(params, x):
        layer = lambda c, w: (c + x @ w["q"] + x @ w["v"], None)
        stacked = {n: params[n] for n in "qv"}
        return jax.lax.scan(layer, x, stacked)[0]

    kernels = lorax.discover(forward, params, uses["q"])
    target = lorax.Target("[qv]", rank=4, dtype=jnp.float16)
    make = lambda key, params: lorax.init(key, params, target, kernels)[0]
    adapters = jax.eval_shape(make, jax.random.key(0), params)
    found = analysis.cost(adapters, params, kernels)
    trained = 96 * 2 * 2 * 12288 * 4
    assert found.adapters.trained == trained == 18_874_368
    total = 96 * 12 * 12288**2 + 52305 * 12288
    assert found.full.trained == total
    assert (
        found.full.checkpoint == 2 * total and found.adapters.checkpoint == 2 * trained
    )
    # "10,000 times" fewer, 350 GB to 35 MB; and a third of the memory where gradients
    # are not counted, as the paper does, a quarter with them
    assert 9_000 < found.ratio("checkpoint") < 10_000
    kept = lambda c: c.params + c.moments
    np.testing.assert_allclose(kept(found.full) / kept(found.adapters), 3.0, rtol=1e-3)
    np.testing.assert_allclose(found.ratio("memory"), 4.0, rtol=1e-3)
    f = 2 * 2 * 12288**2 * 96 * 2  # two examples, q and v
    assert found.full.flops == 3 * f
    assert found.adapters.flops == 2 * f + 3 * f * 4 * 2 // 12288


def test_costs_of_other_adapters():
    params = {"w": jnp.ones((6, 4)), "head": jnp.ones((4, 2)), "n": jnp.arange(3)}
    run = lambda p, x: (x @ p["w"]) @ p["head"]
    kernels = lorax.discover(run, params, jnp.ones((5, 6)))
    targets = [
        lorax.Target("w", rank=2, adapter="adalora"),
        lorax.Target("head", adapter="full"),
    ]
    adapters, _ = lorax.init(jax.random.key(0), params, targets, kernels)
    found = analysis.cost(adapters, params, kernels, moments=1)
    assert found.adapters.trained == 6 * 2 + 2 + 2 * 4 + 8
    assert found.adapters.moments == 4 * found.adapters.trained
    assert found.adapters.params == 4 * (24 + 8 + 3) + 4 * found.adapters.trained
    own, head = 2 * 5 * 24, 2 * 5 * 8
    assert found.adapters.flops == 2 * own + 3 * own * 2 * 10 // 24 + 3 * head
    assert found.full.flops == 3 * (own + head)
    with pytest.raises(KeyError, match="no leaf 'v'"):
        analysis.cost({"v": adapters["w"]}, params)


@pytest.mark.parametrize(
    "name", sorted({*lorax.adapters.REGISTRY} - {"sliced_lora", "rows"})
)
@pytest.mark.filterwarnings("ignore:.*has no form:lorax.MergeWarning")
def test_operations_are_those_that_xla_counts(name):
    """One product and its gradients; XLA also counts the sixteenth of a product that
    a gain only recomputes where its gradient cannot be read off."""
    kernel = jax.ShapeDtypeStruct((256, 384), jnp.float32)
    x, c = (jax.ShapeDtypeStruct((256, n), jnp.float32) for n in kernel.shape)
    target = lorax.Target("w", rank=8, adapter=name)
    fn = lambda p, x: x @ p["w"]
    make = lambda params: lorax.init(jax.random.key(0), params, target)
    kernels = lorax.discover(fn, {"w": kernel}, x)
    own, base = jax.eval_shape(make, {"w": kernel})

    def loss(own, x, base, c):
        return jnp.sum(c * lorax.adapt(fn)(own, base, x))

    step = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(own, x, base, c).compile()
    again = kernels["w"].flops / 16 if "magnitude" in own["w"].roles.values() else 0
    want = step.cost_analysis()["flops"] - again
    found = analysis.cost(own, base, kernels).adapters.flops
    assert found == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize("name", ["oft", "lokr", "ia3"])
def test_a_stack_costs_what_its_kernels_do(name):
    target = lorax.Target("w", rank=2, adapter=name)
    x = jax.ShapeDtypeStruct((5, 64), jnp.float32)

    def flops(shape, fn):
        params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
        kernels = lorax.discover(fn, params, x)
        make = lambda params: lorax.init(jax.random.key(0), params, target, kernels)[0]
        made = jax.eval_shape(make, params)
        return analysis.cost(made, params, kernels).adapters.flops

    one = flops((64, 64), lambda p, x: x @ p["w"])
    layers = lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0]
    assert flops((3, 64, 64), layers) == 3 * one


THIN = {
    "singular_values": lambda key, one, two, w: analysis.singular_values(one),
    "metrics": lambda key, one, two, w: analysis.metrics(one),
    "similarity": lambda key, one, two, w: analysis.subspace_similarity(one, two, "in"),
    "amplification": lambda key, one, two, w: analysis.amplification(key, one, w),
    "intruders": lambda key, one, two, w: analysis.intruder_dimensions(
        key, one, w, k=8, against=32
    ),
}


@pytest.mark.parametrize("name", THIN)
def test_nothing_of_the_kernels_size_is_formed(name):
    n, rank = 8192, 16
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    adapter = lorax.Lora(shape(n, rank), shape(rank, n), 1.0, AXES)
    compiled = jax.jit(THIN[name]).lower(
        jax.eval_shape(lambda: jax.random.key(0)), {"w": adapter}, {"w": adapter},
        {"w": shape(n, n)},
    ).compile()  # fmt: skip
    memory = compiled.memory_analysis()
    most = 64 * n * 42 * 4  # a few dozen [n, rank + more] arrays
    assert memory.temp_size_in_bytes < most < n * n * 4 / 2
