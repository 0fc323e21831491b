"""Checks for `test_howto` of the Start and Concepts pages."""

import jax
import numpy as np

import lorax


def install(scope):
    np.testing.assert_array_equal(scope["y"], np.ones(4))


def own_loop(scope):
    params, batch = scope["params"], scope["batch"]
    start = scope["loss_fn"](params, batch)
    assert scope["value"] < 0.3 * start
    after = scope["loss_fn"](scope["merged"], batch)
    adapted = scope["loss"](scope["adapters"], params, batch)
    np.testing.assert_allclose(after, adapted, rtol=1e-4)


def nnx(scope):
    adapted, merged, tokens = (scope[n] for n in ("adapted", "merged", "tokens"))
    found = {p: type(a).__name__ for p, a in adapted.adapters.get_value().items()}
    attention = [f"attention/{name}/kernel" for name in ("query", "value")]
    low_rank = {"up/kernel": "Dora", "down/kernel": "Dora"}
    assert found == low_rank | dict.fromkeys(attention, "Lora")
    assert scope["losses"][-1] < 0.8 * scope["losses"][0]
    assert type(merged) is scope["Model"]
    np.testing.assert_allclose(merged(tokens), adapted(tokens), atol=1e-4)


def walker(scope):
    assert "tanh" in str(scope["told"][0].message)
    names = [equation.primitive.name for equation in scope["jaxpr"].eqns]
    assert str(scope["jaxpr"]).count("dot_general[") == 3, names
    merged = lorax.merge(scope["adapters"], scope["params"])
    np.testing.assert_allclose(
        scope["y"], scope["squashed"](merged, np.ones(4, np.float32)), rtol=1e-5
    )


def paths(scope):
    layers = {"layers/0/q": 2, "layers/0/up": 2, "layers/1/q": 4, "layers/1/up": 4}
    assert scope["ranks"] == layers | {"head": None}


def roles(scope):
    assert scope["roles"]["w"] == {"a": "a", "b": "b", "magnitude": "magnitude"}
    assert scope["roles"]["bias"] == {"value": "value"}
    w, bias = scope["decays"]["w"], scope["decays"]["bias"]
    assert (w.a, w.b, w.magnitude, bias.value) == (True, True, False, False)


def masks(scope):
    assert scope["trained"] == 256
    assert scope["grads"]["w"].b.shape == (2, 64)
    sizes = [leaf.size for leaf in jax.tree.leaves(scope["state"])]
    assert sum(sizes) == 2 * 256 + 1  # two moments, and a count


def merging(scope):
    report = scope["report"]
    assert 0 < report.lost < 1
    assert scope["merged"]["w"].dtype == "bfloat16"


CHECKS = (install, own_loop, nnx, walker, paths, roles, masks, merging)
