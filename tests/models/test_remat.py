"""What a layer keeps, by name: the products saved, and every gradient."""

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax import analysis, sharding
from lorax.interop import hf
from lorax.models import gpt2, llama, remat, roberta, t5

KEY = jax.random.key(0)
SIZES = {"vocabulary": 40, "width": 16, "layers": 2, "heads": 4, "hidden": 24}
MODELS = {
    "llama": llama.Model(llama.Config(**SIZES, kv_heads=2, head_dim=4)),
    "gpt2": gpt2.Model(gpt2.Config(**SIZES, positions=16)),
    "roberta": roberta.Model(roberta.Config(**SIZES, positions=16)),
    "t5": t5.Model(t5.Config(**SIZES, decoder_layers=2, head_dim=4, gated=True)),
}
NAMES = {
    "llama": llama.NAMES,
    "gpt2": gpt2.NAMES,
    "roberta": roberta.NAMES,
    "t5": t5.NAMES,
}
ROWS, TIME = 2, 8


def slope(model, text):
    """The jitted gradient of a loss, under a policy."""
    model = type(model)(dataclasses.replace(model.config, remat=text))

    def loss(params, *tokens):
        return jnp.square(model.apply({"params": params}, *tokens)).sum()

    return jax.jit(jax.grad(loss))


@functools.cache
def drawn(family):
    """Parameters and tokens; real values for the Llama family, else only shapes."""
    model = MODELS[family]
    tokens = [jax.random.randint(KEY, (ROWS, TIME), 3, 40) for _ in hf.example(model)]
    if family == "llama":
        return jax.jit(model.init)(KEY, *tokens)["params"], *tokens
    return jax.eval_shape(model.init, KEY, *tokens)["params"], *tokens


def operations(text):
    traced = slope(MODELS["llama"], text).trace(*drawn("llama"))
    return analysis.operations(traced.jaxpr)


def test_a_name_that_is_kept_spares_its_product_by_hand():
    full = operations("full")
    each = 2 * ROWS * TIME * 16 * SIZES["layers"]  # for a kernel [16, 1]
    spared = {
        "save=q": 16 * each,
        "save=q,k,v": (16 + 8 + 8) * each,
        "save=gate; offload=up": 2 * 24 * each,
        "offload=input": 0,
        "save=down": 0,  # no gradient of this layer reads it
        # scores and weighted values, for every head and pair of tokens
        "save=attention": 2 * ROWS * TIME * TIME * 16 * SIZES["layers"],
    }
    assert {text: full - operations(text) for text in spared} == spared
    others = ",".join(sorted({*llama.NAMES} - {"gate", "up"}))
    assert operations("recompute=gate,up") == operations(f"save={others}")
    assert operations("none") < operations("recompute=gate,up") < full


@pytest.mark.parametrize("family", MODELS)
def test_the_names_are_those_of_the_layers(family):
    def of(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "name":
                yield eqn.params["name"]
            for sub in jax.extend.core.jaxprs_in_params(eqn.params):
                yield from of(sub)

    model, (params, *tokens) = MODELS[family], drawn(family)
    traced = jax.make_jaxpr(lambda p: model.apply({"params": p}, *tokens))(params)
    outside = {"head", "classifier_dense", "classifier_out"}
    assert {*of(traced.jaxpr)} - outside == {*NAMES[family]}


def test_names_are_no_kernels_and_adapters_train_through_them():
    model, (params, tokens) = MODELS["llama"], drawn("llama")

    def slopes(text):
        own = type(model)(dataclasses.replace(model.config, remat=text))
        fn = lambda params, x: jnp.square(own.apply({"params": params}, x)).sum()
        kernels = lorax.discover(fn, params, tokens)
        assert {*kernels} <= {*lorax.tree.flatten(params)}
        adapters, base = lorax.init(
            KEY, params, [lorax.Target("all-linear", 2)], kernels
        )
        adapters = jax.tree.map(lambda x: x + 0.1, adapters)
        return jax.jit(jax.grad(lorax.adapt(fn)))(adapters, base, tokens)

    got, want = slopes("save=q,up; offload=input,attention"), slopes("none")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("all", "remat='all': give one of none, full, dots, or lists of names such as"),
        ("save=", "or lists of names such as 'save=q,k,v; offload=input'"),
        ("save=q; save=k", "or lists of names"),
        ("keep=q", "or lists of names"),
        ("gather=q", "or lists of names"),
        ("recompute=q; save=k", "recompute keeps every name that it does not list"),
        ("save=q,k; offload=k", "k cannot be both saved and offloaded"),
    ],
)
def test_what_is_not_a_policy(text, told):
    with pytest.raises(ValueError, match=told):
        remat.parse(text)


def test_gathered_kernels_are_constrained_under_a_mesh():
    def constraints(text, mesh):
        with jax.set_mesh(mesh):
            lowered = slope(MODELS["llama"], text).lower(*drawn("llama")).as_text()
        return lowered.count("sharding_constraint") + lowered.count("@Sharding")

    cut = sharding.make_mesh(fsdp=4, tensor=2)
    extra = constraints("gather", cut) - constraints("full", cut)
    assert extra >= 7  # for seven kernels, and their gradients
    other = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    assert constraints("gather", other) == constraints("full", other)


def test_a_name_that_the_layer_does_not_give():
    with pytest.raises(ValueError, match="no tensor gates; it has input, q, k, v"):
        slope(MODELS["llama"], "save=q,gates").trace(*drawn("llama"))
