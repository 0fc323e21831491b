"""Selection: which leaves get which adapter, and every refusal."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lorax
from lorax.selection import select
from lorax.targets import Target

KEY = jax.random.key(0)
PARAMS = {
    "embed": {"embedding": jnp.ones((7, 4))},
    "block": {
        "q": {"kernel": jnp.ones((4, 6)), "bias": jnp.zeros(6)},
        "v": {"kernel": jnp.ones((6, 4)), "bias": jnp.zeros(4)},
    },
    "conv": {"kernel": jnp.ones((3, 4, 4))},
    "stack": {"kernel": jnp.ones((3, 4, 4))},
    "head": {"kernel": jnp.ones((4, 7))},
    "steps": jnp.int32(5),
}
IDS = jnp.array([[0, 1, 2]])
LINEAR = ["block/q/kernel", "block/v/kernel", "conv/kernel", "stack/kernel"]


def model(params, ids):
    """Embedding, two dots, a convolution, three scanned layers and a head."""
    x = params["embed"]["embedding"][ids]
    for layer in (params["block"]["q"], params["block"]["v"]):
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    x = nn.Conv(4, (3,), use_bias=False).apply({"params": params["conv"]}, x)
    x, _ = jax.lax.scan(lambda x, w: (x @ w, None), x, params["stack"]["kernel"])
    return x @ params["head"]["kernel"] * params["steps"]


KERNELS = lorax.discover(model, PARAMS, IDS)


def paths(*targets, params=PARAMS, kernels=KERNELS):
    return list(select(params, targets, kernels))


def test_the_first_match_wins():
    rules = [Target("block/q/.*", adapter="full"), (".*/kernel", 2), Target("head/.*")]
    chosen = select(PARAMS, rules, KERNELS)
    assert chosen["block/q/kernel"][0] is rules[0]
    assert chosen["block/v/kernel"][0] == Target(".*/kernel", rank=2)
    assert (
        chosen["head/kernel"][0].rank == 2
    )  # the third rule is shadowed, and that is fine
    assert "block/v/bias" not in chosen


def test_all_linear_is_what_peft_means_by_it():
    target = functools.partial(Target, "all-linear", rank=2)
    assert paths(target()) == LINEAR
    assert paths(target(exclude="block/.*")) == LINEAR[2:]
    assert paths(target(exclude=["block/.*", "stack/.*"])) == LINEAR[2:3]
    assert "head/kernel" in paths(target(), ("head/kernel", 2))


@pytest.mark.parametrize("attend_first", [False, True])
def test_all_linear_leaves_a_tied_head_alone(attend_first):
    def tied(params, ids):
        table = params["table"]
        x = table[ids] if not attend_first else jnp.ones((3, 4)) @ table.T @ table
        return jnp.tanh(x @ params["w"]) @ table.T

    params = {"table": jnp.ones((7, 4)), "w": jnp.ones((4, 4))}
    kernels = lorax.discover(tied, params, IDS)
    assert kernels["table"].tied and not kernels["w"].tied
    assert paths(("all-linear", 2), params=params, kernels=kernels) == ["w"]


def test_several_heads_are_left_alone_and_scan_layers_are_no_heads():
    def two_heads(params, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])
        step = jax.jit(lambda w: jnp.tanh(x) @ w)
        return step(params["policy"]), jnp.einsum("bi,io->bo", x, params["value"])

    square = jnp.ones((4, 4))
    params = {"stack": jnp.ones((3, 4, 4)), "policy": square, "value": square}
    kernels = lorax.discover(two_heads, params, jnp.ones((2, 4)))
    assert [path for path, kernel in kernels.items() if kernel.head] == [
        "policy",
        "value",
    ]
    assert paths(("all-linear", 2), params=params, kernels=kernels) == ["stack"]


def test_two_dimensional_kernels_need_no_discovery():
    adapters, _ = lorax.init(KEY, PARAMS, [("block/.*/kernel", 3)])
    shapes = {path: (lora.a.shape, lora.b.shape) for path, lora in adapters.items()}
    assert shapes == {
        "block/q/kernel": ((4, 3), (3, 6)),
        "block/v/kernel": ((6, 3), (3, 4)),
    }


def test_layers_get_factors_for_a_subset_of_a_stack():
    adapters, _ = lorax.init(
        KEY, PARAMS, Target("stack/kernel", 2, layers=[0, 2]), KERNELS
    )
    lora = adapters["stack/kernel"]
    assert (lora.a.shape, lora.b.shape, lora.layers) == ((2, 4, 2), (2, 2, 4), (0, 2))
    lora = lora.replace(b=jnp.ones_like(lora.b))
    merged = lorax.merge({"stack/kernel": lora}, PARAMS)["stack"]["kernel"]
    moved = np.any(np.asarray(merged) != 1, axis=(1, 2))
    assert moved.tolist() == [True, False, True]


def test_full_trains_any_floating_leaf():
    adapters, _ = lorax.init(KEY, PARAMS, Target(".*/bias|head/.*", adapter="full"))
    assert sorted(adapters) == ["block/q/bias", "block/v/bias", "head/kernel"]
    assert adapters["head/kernel"].value.dtype == jnp.float32


FIELDS = [
    (dict(pattern="("), r"'\(' is not a regular expression"),
    (dict(pattern="w", exclude="["), r"'\[' is not a regular expression"),
    (dict(pattern="w", rank=0), "rank=0; give a whole number >= 1"),
    (dict(pattern="w", rank=-1), "rank=-1"),
    (dict(pattern="w", rank=2.5), "rank=2.5"),
    (dict(pattern="w", rank=True), "rank=True"),
    (dict(pattern="w", alpha=0), "alpha=0; give a number > 0"),
    (dict(pattern="w", alpha=float("nan")), "alpha=nan"),
    (
        dict(pattern="w", adapter="prompt"),
        "adapter='prompt'; choose one of adalora, delora, dora, full, ",
    ),
    (dict(pattern="w", scaling="none"), "choose one of standard, rank_stabilized"),
    (dict(pattern="w", dropout=1.0), r"dropout=1.0; give a rate in \[0, 1\)"),
    (dict(pattern="w", dropout=-0.1), "dropout=-0.1"),
    (dict(pattern="w", dtype=jnp.int32), "give a floating dtype"),
    (dict(pattern="w", layers=()), "give increasing numbers"),
    (dict(pattern="w", layers=(2, 1)), "give increasing numbers"),
    (dict(pattern="w", layers=(1, 1)), "give increasing numbers"),
    (dict(pattern="w", layers=(-1,)), "give increasing numbers"),
]


@pytest.mark.parametrize(("fields", "message"), FIELDS)
def test_a_bad_field_is_refused_at_construction(fields, message):
    with pytest.raises(ValueError, match=message):
        Target(**fields)


LEAVES = [
    ("block/q/kernal", "'block/q/kernal' matches no leaf; nearest.*'block/q/kernel'"),
    ("kernel", "matches no leaf"),  # patterns match the whole path
    (Target("head/.*", exclude=".*"), "matches no leaf outside its exclude"),
    ("steps", "steps: matched by 'steps', but its dtype is int32"),
    ("block/q/bias", "no linear operation uses it .*adapter='full'.*nearest paths"),
    (Target("block/q/kernel", rank=5), r"rank=5 is above min\(in, out\) = 4"),
    (Target("stack/kernel", 2, layers=(1, 3)), r"layers=\(1, 3\).*stacks 3 layers"),
    (Target("head/kernel", 2, layers=(0,)), "is not a stack of layers"),
    (Target("head/kernel", 2, init="pisa"), "init='pisa'; choose one of standard"),
    ([], "no targets; give at least one"),
]


@pytest.mark.parametrize(("targets", "message"), LEAVES)
def test_a_leaf_that_cannot_be_adapted_is_named(targets, message):
    with pytest.raises(ValueError, match=message):
        lorax.init(KEY, PARAMS, targets, KERNELS)


def test_without_kernels_unknown_axes_and_all_linear_ask_for_them():
    for targets, message in (
        (Target("conv/kernel", 2), r"shape \(3, 4, 4\) does not say.*discover"),
        ("all-linear", r"pass kernels=lorax.discover\(loss_fn, params, batch\)"),
    ):
        with pytest.raises(ValueError, match=message):
            lorax.init(KEY, PARAMS, targets)
    with pytest.raises(TypeError, match="a target is a lorax.Target or a tuple.* 3"):
        lorax.init(KEY, PARAMS, [3])


def test_kernels_of_another_model_are_refused():
    other = {"w": jnp.ones((4, 3))}
    with pytest.raises(KeyError, match="given to init has no leaf 'block/q/bias'"):
        lorax.init(KEY, other, "w", KERNELS)
    kernels = lorax.discover(lambda params: jnp.ones((1, 4)) @ params["w"], other)
    with pytest.raises(
        ValueError, match=r"w: the leaf has shape \(5, 3\).*run discover"
    ):
        lorax.init(KEY, {"w": jnp.ones((5, 3))}, Target("w", 2), kernels)
    more = other | {"v": jnp.ones((4, 3))}
    with pytest.raises(KeyError, match="program given to discover has no leaf 'v'"):
        lorax.init(KEY, more, Target("v", 2), kernels)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_parameters_that_are_not_finite_are_named(value):
    params = {
        "a": jnp.ones((4, 3)),
        "b": {"kernel": jnp.ones((4, 3)).at[1, 1].set(value)},
    }
    with pytest.raises(ValueError, match="^b/kernel: .*NaN or infinite"):
        lorax.init(KEY, params, Target("a", 2))


def test_an_nnx_module_is_refused_with_the_way_out():
    module = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    fn = lambda module, x: module(x)
    for verb in (
        lambda: lorax.init(KEY, module, "kernel"),
        lambda: lorax.discover(fn, module, jnp.ones((1, 4))),
        lambda: lorax.merge({}, module),
        lambda: lorax.adapt(fn)({}, module, jnp.ones((1, 4))),
    ):
        with pytest.raises(TypeError, match=re.escape("nnx.split(model)")):
            verb()


MATRIX, STACK = lorax.Axes((0,), (1,)), lorax.Axes((1,), (2,), (0,))


def lora(a, b, axes=MATRIX, **fields):
    return lorax.Lora(jnp.ones(a), jnp.ones(b), 1.0, axes, **fields)


MISFITS = [
    ("head/kernel", lora((5, 2), (2, 7)), r"needs \(4, 2\) and \(2, 7\); .*another"),
    ("head/kernel", lora((4, 2), (3, 7)), r"shapes \(4, 2\) and \(3, 7\)"),
    ("stack/kernel", lora((4, 2), (2, 4)), "has Axes.*another model"),
    ("stack/kernel", lora((1, 4, 2), (1, 2, 4), STACK, layers=(3,)), "no such layers"),
    ("steps", lora((4, 2), (2, 7)), "steps: the leaf has dtype int32"),
    ("steps", lorax.Full(jnp.float32(5)), "steps: .*only floating leaves can be"),
    (
        "head/kernel",
        lorax.Full(jnp.ones((4, 3))),
        r"\(4, 3\), but the leaf has \(4, 7\)",
    ),
]


@pytest.mark.parametrize(("path", "adapter", "message"), MISFITS)
def test_an_adapter_for_another_model_is_refused(path, adapter, message):
    for verb in (lorax.merge, lorax.adapt(model)):
        with pytest.raises(ValueError, match=message):
            verb({path: adapter}, PARAMS, *([IDS] if verb is not lorax.merge else []))


def test_a_missing_leaf_and_swapped_arguments_are_named():
    adapters = {"heads/kernel": lora((4, 2), (2, 7))}
    with pytest.raises(
        KeyError, match="no leaf 'heads/kernel'; nearest.*'head/kernel'"
    ):
        lorax.merge(adapters, PARAMS)
    with pytest.raises(KeyError, match="no leaf 'heads/kernel'"):
        lorax.adapt(model)(adapters, PARAMS, IDS)
    with pytest.raises(TypeError, match="the first argument is the dict of adapters"):
        lorax.merge({"head/kernel": jnp.ones((4, 7))}, PARAMS)
    with pytest.raises(ValueError, match="w: the leaf is not an array"):
        lorax.merge({"w": lora((4, 2), (2, 7))}, {"w": 3.0})
    with pytest.raises(ValueError, match="on_merge='never'; choose 'warn' or 'error'"):
        lorax.adapt(model, on_merge="never")
