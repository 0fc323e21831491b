"""A different adapter for every example, at the cost of thin products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax import compose
from tests import adapter_sets as make
from tests.programs import normal
from tests.test_adapt import assert_close

K, BATCH, TOKENS = 16, 7, 3
TRACES = []


def fn(params, x):
    """One example, `[tokens, 6]`: every parametrisation, a scan, a trained bias."""
    TRACES.append(0)
    x = jnp.tanh(x @ params["lora"])  # [tokens, 5]
    step = lambda x, w: (jnp.tanh(x @ w), None)
    x = jax.lax.scan(step, x, params["dora"])[0]
    return {"y": jnp.tanh(x @ params["adalora"] + params["bias"]), "sum": x.sum()}


def adapter_set(seed):
    rank, scale = 1 + seed % 3, [0.5, 1.0, 2.0, 1.5][seed % 4]
    return {
        "lora": make.lora(seed, rank, scale),
        "dora": make.dora(seed, rank, scale, (5,), (5,), (2,)),
        "adalora": make.adalora(seed, rank, scale, (5,), (4,)),
        "bias": lorax.Full(normal(seed, 4)),
    }


PARAMS = {
    "lora": normal(1, 6, 5),
    "dora": normal(2, 2, 5, 5),
    "adalora": normal(3, 5, 4),
    "bias": normal(4, 4),
}
X = normal(5, BATCH, TOKENS, 6)
INDEX = jnp.array([3, 15, 0, 3, 9, 12, 7])


@functools.cache
def population(first):
    sets = [adapter_set(first + i) for i in range(K)]
    return sets, compose.stack(sets)


def quick(function, *args):
    lowered = jax.jit(function).lower(*args)
    return lowered.compile({"xla_backend_optimization_level": 0})


@functools.cache
def routed():
    """The routed function, compiled, and how often it was traced."""
    before = len(TRACES)
    routed = compose.route(fn, on_merge="error")
    compiled = quick(routed, population(0)[1], INDEX, PARAMS, X)
    return compiled, len(TRACES) - before


def test_every_example_gets_its_own_adapter_and_swaps_compile_nothing():
    compiled, traces = routed()
    assert traces == 1
    plain = jax.jit(fn)
    plain(PARAMS, X[0])
    before = len(TRACES)
    for first in (0, 100):  # the second population runs in the same executable
        sets, stacked = population(first)
        got = compiled(stacked, INDEX, PARAMS, X)
        for i, k in enumerate(INDEX.tolist()):
            want = plain(lorax.merge(sets[k], PARAMS), X[i])
            assert_close(jax.tree.map(lambda y: y[i], got), want)
    assert len(TRACES) == before


def test_jit_does_not_trace_again_for_other_adapters():
    jitted = jax.jit(compose.route(lambda p, x: (TRACES.append(0), x @ p["w"])[1]))
    stacks = [
        compose.stack([{"w": make.lora(s + i, 1 + i)} for i in range(2)])
        for s in (0, 9)
    ]
    before, args = len(TRACES), ({"w": PARAMS["lora"]}, X[:2])
    one, two = (jitted(s, jnp.array([0, 1]), *args) for s in stacks)
    jitted(stacks[0], jnp.array([1, 1]), *args)
    assert len(TRACES) == before + 1 and np.abs(one - two).max() > 0.1


def test_the_gradient_is_that_of_each_example_alone():
    _, stacked = population(0)

    def loss(out):
        return jnp.sum(out["y"] ** 2) + jnp.sum(out["sum"])

    def defined(stacked):
        def one(k, x):
            own = jax.tree.map(lambda leaf: leaf[k], stacked)
            return loss(fn(lorax.merge(own, PARAMS), x))

        return jax.vmap(one)(INDEX, X).sum()

    routes = lambda stacked: loss(compose.route(fn)(stacked, INDEX, PARAMS, X))
    both = lambda stacked: [jax.value_and_grad(f)(stacked) for f in (routes, defined)]
    got, want = quick(both, stacked)(stacked)
    assert_close(got, want)
    unused = jax.tree.map(lambda leaf: leaf[1], got[1])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(unused))


def products(jaxpr):
    """The FLOPs of every dot_general, inner jaxprs included."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (read, _), _ = eqn.params["dimension_numbers"]
            width = np.prod([eqn.invars[0].aval.shape[d] for d in read])
            found.append(2 * int(width) * eqn.outvars[0].aval.size)
        for value in eqn.params.values():
            if hasattr(value, "jaxpr"):
                found += products(value.jaxpr)
    return found


@pytest.mark.parametrize("maker", [make.lora, make.dora])
def test_the_frozen_product_is_done_once_and_the_norm_once_per_adapter(maker):
    n, m, r, k = 32, 16, 2, 3
    stacked = compose.stack([{"w": maker(i, r, 1.0, (n,), (m,))} for i in range(k)])
    routed = compose.route(lambda params, x: x @ params["w"], on_merge="error")
    params, x, index = (
        {"w": normal(1, n, m)},
        normal(2, 8, TOKENS, n),
        jnp.arange(8) % k,
    )
    jaxpr = jax.make_jaxpr(routed)(stacked, index, params, x)
    rows = 8 * TOKENS
    base, thin = 2 * rows * n * m, 2 * rows * (n * r + r * m)
    norm = k * 2 * r * (n * m + n * r + r * m) if maker is make.dora else 0
    assert sum(products(jaxpr.jaxpr)) == base + thin + norm


@pytest.mark.parametrize("maker", [make.lora, make.dora])
def test_more_adapters_cost_no_more_operations(maker):
    """Nor do they change an example's result, or the NaN from a bad index."""
    n, m, batch = 32, 16, 8
    sets = [{"w": maker(i, 2, 0.5, (n,), (m,))} for i in range(64)]
    routed = compose.route(lambda params, x: x @ params["w"], on_merge="error")
    params, x = {"w": normal(1, n, m)}, normal(2, batch, TOKENS, n)
    index = jnp.arange(batch)
    runs = {}
    for k in (batch, batch + 1, 64):
        args = compose.stack(sets[:k]), index, params, x
        runs[k] = quick(routed, *args)
        assert_close(
            runs[k](*args), runs[batch](compose.stack(sets[:batch]), *args[1:])
        )
    flops = {k: run.cost_analysis()["flops"] for k, run in runs.items()}
    assert flops[batch + 1] == flops[64] <= 1.05 * flops[batch], flops
    out = runs[64](compose.stack(sets), index.at[1].set(64), params, x)
    assert np.isnan(out[1]).all() and np.isfinite(np.delete(out, 1, 0)).all()


def test_in_axes_and_keywords():
    def scaled(params, x, shift, *, double):
        return (1 + double) * (x @ params["w"] + shift)

    sets = [{"w": make.lora(i)} for i in range(2)]
    routed = compose.route(scaled, in_axes=(1, None))
    params, x = {"w": PARAMS["lora"]}, normal(1, 6, 3)
    got = routed(compose.stack(sets), jnp.array([1, 0, 1]), params, x, 0.5, double=True)
    kernels = [np.asarray(params["w"]) + make.delta(s["w"]) for s in sets]
    want = [
        2 * (np.asarray(x)[:, i] @ kernels[k] + 0.5) for i, k in enumerate([1, 0, 1])
    ]
    make.close(got, np.stack(want))


def test_dropout_differs_by_example_and_needs_a_key():
    stacked = compose.stack([{"w": make.lora(1, dropout=0.5)}])
    routed = compose.route(lambda params, x: x @ params["w"])
    args = stacked, jnp.zeros(4, int), {"w": PARAMS["lora"]}, jnp.ones((4, 8, 6))
    still, dropped = routed(*args), routed(*args, lora_key=jax.random.key(0))
    make.close(still[0], still[3])
    assert np.abs(dropped[0] - dropped[3]).max() > 0.1


def test_a_bf16_base_stays_bf16():
    stacked = compose.stack([{"w": make.lora(i)} for i in range(2)])
    params, x = {"w": PARAMS["lora"].astype(jnp.bfloat16)}, X.astype(jnp.bfloat16)[:2]
    got = compose.route(lambda p, x: x @ p["w"])(stacked, jnp.arange(2), params, x)
    assert got.dtype == jnp.bfloat16
    for i in range(2):
        kernel = np.asarray(params["w"], np.float64) + make.delta(make.lora(i))
        make.close(got[i], np.asarray(x[i], np.float64) @ kernel, 2**-6)


def test_a_bad_index_is_an_error_and_under_jit_nan():
    stacked = compose.stack([{"w": make.lora(i)} for i in range(2)])
    routed = compose.route(lambda params, x: x @ params["w"])
    call = lambda index: routed(stacked, index, {"w": PARAMS["lora"]}, X[:3])
    with pytest.raises(ValueError, match=r"index holds \[-1, 2\].* 2 adapters.* to 1"):
        call(jnp.array([0, 2, -1]))
    out = jax.jit(call)(jnp.array([0, 2, -1]))
    assert np.isfinite(out[0]).all() and np.isnan(out[1:]).all()
    with pytest.raises(ValueError, match=r"index has shape \(3,\) and dtype float32"):
        call(jnp.zeros(3))
    with pytest.raises(ValueError, match="no common leading axis"):
        routed({"w": make.lora(1)}, jnp.arange(3), {"w": PARAMS["lora"]}, X[:3])
    with pytest.raises(ValueError, match="w: the factors have shapes"):
        routed(stacked, jnp.zeros(3, int), {"w": PARAMS["lora"].T}, X[:3])
    with pytest.raises(KeyError, match="no leaf 'w'"):
        routed(stacked, jnp.zeros(3, int), {"v": PARAMS["lora"]}, X[:3])
