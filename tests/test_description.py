"""The description says, leaf by leaf, what targets adapt and leave out, and why."""

import re
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lorax
from tests import programs

KEY = jax.random.key(0)
PARAMS = {
    "embed": programs.normal(0, 9, 4),
    "position": programs.normal(1, 3, 4),
    "up": programs.normal(2, 2, 4, 6),
    "bias": programs.normal(3, 2, 6),  # a vector per layer
    "down": programs.normal(4, 6, 4),
    "mask": programs.normal(5, 4, 4),
    "cumulated": programs.normal(6, 4, 4),
    "depth": programs.normal(7, 3, 1, 4),
    "idle": programs.normal(8, 5, 5),
    "head": programs.normal(9, 4, 9),
    "scale": programs.normal(10, 4),
    "steps": jnp.zeros((2, 2), jnp.int32),
}
IDS = jnp.array([[0, 3, 5]])


def fn(p, ids):
    x = (p["embed"][ids] + p["position"]) * p["scale"]

    def layer(x, own):
        up, bias = own
        return x + jnp.tanh(x @ up + bias) @ p["down"], None

    x, _ = jax.lax.scan(layer, x, (p["up"], p["bias"]))
    x = jnp.sin(x @ (p["mask"] * jnp.tril(jnp.ones((4, 4)))))
    x = jax.lax.conv_general_dilated(
        x, p["depth"], (1,), "SAME", None, None, ("NWC", "WIO", "NWC"), 4
    )
    return x @ jnp.cumsum(p["cumulated"], 0) @ p["head"]


KERNELS = lorax.discover(fn, PARAMS, IDS)
ALL = lorax.Target("all-linear", rank=2, exclude="down")


def test_every_matrix_is_there_with_its_reason():
    found = lorax.describe(PARAMS, ALL, KERNELS)
    assert [leaf.path for leaf in found.adapted] == ["up"]
    (up,) = found.adapted
    assert up.use == "dot: reads 1, writes 2, batch 0" and up.adapter == "Lora"
    assert up.target == "all-linear" and up.reason == ""
    assert up.parameters == 2 * (4 * 2 + 2 * 6) == found.parameters
    reasons = {leaf.path: leaf.reason for leaf in found.left_out}
    line = r" at .*test_description.py"
    wanted = {
        "cumulated": "'cumsum'" + line,
        "depth": "a depthwise convolution",
        "down": "excluded by its target",
        "embed": "an embedding",
        "head": "an output head",
        "idle": "the program does not use it",
        "mask": "'mul'" + line,
        "position": "'add'" + line,
    }
    assert reasons.keys() == wanted.keys()
    for path, reason in wanted.items():
        assert re.match(reason, reasons[path]), (path, reasons[path])


def test_the_table_by_hand():
    params = {"w": jnp.ones((4, 3)), "v": jnp.ones((3, 5))}
    kernels = lorax.discover(lambda p, x: x @ p["w"] @ p["v"], params, jnp.ones((2, 4)))
    target = lorax.Target("w", rank=1, adapter="dora")
    lines = str(lorax.describe(params, target, kernels)).splitlines()
    assert [line.split() for line in lines] == [
        "path shape use adapter parameters target or reason".split(),
        "v 3x5 dot: reads 0, writes 1 - 0 'w' does not match".split(),
        "w 4x3 dot: reads 0, writes 1 Dora 10 w".split(),
        "10 parameters train in 1 leaf; 1 matrix is left out".split(),
    ]


@pytest.mark.parametrize("adapter", ["lora", "dora", "adalora", "full"])
@pytest.mark.parametrize("init", ["standard", "lora_ga"])
def test_parameters_are_those_that_init_makes(adapter, init):
    if init == "lora_ga" and adapter != "lora":
        pytest.skip("looks at gradients for plain factors only")
    targets = [lorax.Target("up|down", rank=2, adapter=adapter, init=init)]
    abstract = jax.eval_shape(lambda: PARAMS)
    found = {leaf.path: leaf for leaf in lorax.describe(abstract, targets, KERNELS)}
    plain = lorax.Target("up|down", rank=2, adapter=adapter)
    adapters, _ = lorax.init(KEY, PARAMS, plain, KERNELS)
    for path, made in adapters.items():
        assert found[path].adapter == type(made).__name__
        assert found[path].parameters == sum(x.size for x in jax.tree.leaves(made))


def test_an_adapted_kernel_that_is_merged_somewhere_says_where():
    both = lambda p, x: jnp.sum(x @ p["w"]) + jnp.sum(jnp.sin(p["w"]))
    params = {"w": jnp.ones((4, 4))}
    kernels = lorax.discover(both, params, jnp.ones((2, 4)))
    (leaf,) = lorax.describe(params, lorax.Target("w", rank=1), kernels)
    assert leaf.adapter == "Lora" and leaf.reason.startswith("merged for 'sin' at ")


def test_init_warns_once_of_what_all_linear_cannot_follow():
    with pytest.warns(lorax.TargetWarning, match="used by an operation") as caught:
        lorax.init(KEY, PARAMS, ALL, KERNELS)
    (warning,) = caught
    text = str(warning.message)
    assert "mask (4, 4): 'mul'" in text and "cumulated (4, 4): 'cumsum'" in text
    for path in ("embed", "position", "head", "bias", "idle", "scale", "down"):
        assert f"  {path} " not in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = lorax.Target("all-linear", rank=2, exclude="mask|cumulated")
        lorax.init(KEY, PARAMS, out, KERNELS)
        whole = lorax.Target("mask|cumulated", adapter="full")
        lorax.init(KEY, PARAMS, [whole, lorax.Target("all-linear", rank=2)], KERNELS)
        lorax.init(KEY, PARAMS, lorax.Target("up", rank=2), KERNELS)


def test_low_rank_layers_of_the_model_itself_are_left_out():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.LoRALinear(6, 5, lora_rank=2, rngs=rngs)
            self.head = nnx.Linear(5, 3, rngs=rngs)

        def __call__(self, x):
            return self.head(jnp.tanh(self.hidden(x)))

    graph, state = nnx.split(Model(nnx.Rngs(0)))
    loss = lambda state, x: nnx.merge(graph, state)(x)
    kernels = lorax.discover(loss, state, jnp.ones((2, 6)))
    target = lorax.Target("all-linear", rank=1)
    found = lorax.describe(state, target, kernels)
    assert [leaf.path for leaf in found.adapted] == ["hidden/kernel"]
    theirs = "a low-rank factor of the model's own"
    assert {leaf.path: leaf.reason for leaf in found.left_out} == {
        "head/kernel": "an output head",
        "hidden/lora/lora_a": theirs,
        "hidden/lora/lora_b": theirs,
    }
    named = lorax.Target("hidden/lora/lora_a", rank=1)  # they can be selected by name
    assert [leaf.path for leaf in lorax.describe(state, named, kernels).adapted]


def test_all_linear_with_nothing_to_adapt_says_why():
    only = {path: PARAMS[path] for path in ("embed", "head")}
    fn = lambda p, ids: p["embed"][ids] @ p["head"]
    kernels = lorax.discover(fn, only, IDS)
    want = "no leaf; embed: an embedding: its rows are looked up; head: an output head"
    with pytest.raises(ValueError, match=want):
        lorax.describe(only, "all-linear", kernels)


def test_a_model_of_linen_without_kernels():
    x = jnp.ones((2, 4))
    params = nn.Dense(3).init(KEY, x)
    (leaf,) = lorax.describe(params, lorax.Target("kernel", rank=2))
    assert leaf.use == "dot: reads 0, writes 1" and leaf.parameters == 14
