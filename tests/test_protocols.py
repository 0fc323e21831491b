"""What all adapters and all inits share: the same tests for every row."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax import adapters as adapter_classes
from lorax import inits, tree
from tests import programs
from tests.adapter_rows import ADAPTERS, BATCH, IN, OUT
from tests.plugin import methods
from tests.test_adapt import assert_close

KEY = jax.random.key(0)
pytestmark = pytest.mark.filterwarnings("ignore:.*RandLora has no form")


# The first row of every class.
FIRST = list({adapter_classes.of_target(r[4]): r for r in ADAPTERS[::-1]}.values())


def every_version(row):
    """On the second version, one row per class suffices, except for LoRA and DoRA."""
    return row in FIRST or row[4].adapter in ("lora", "dora")


rows = pytest.mark.parametrize(
    "row",
    [
        pytest.param(
            row, id=row[0], marks=() if every_version(row) else pytest.mark.once
        )
        for row in ADAPTERS
    ],
)
X = programs.normal(9, BATCH, IN)


@functools.cache
def make(row, dtype=jnp.float32, size=0.3):
    """The program's function, perturbed adapters, and params with nonzero biases."""
    _, fn, shape, bias, target = row
    params = {
        "w": (programs.normal(1, *shape) / 2).astype(dtype),
        "bias": programs.normal(2, bias).astype(dtype),
        "steps": jnp.int32(3),
        "key": jax.random.key(5),
    }
    kernels = lorax.discover(fn, params, X.astype(dtype))
    adapters, params = lorax.init(KEY, params, target, kernels)
    return fn, programs.perturbed(adapters, size), params


def in_place(adapters, params):
    """Adapters with their frozen arrays, and the parameters without."""
    plain, frozen = tree.split(params)
    bound = adapter_classes.bound
    return {path: bound(a, frozen, path) for path, a in adapters.items()}, plain


def adapt(row, fn):
    """Nothing is merged, except for classes that have no form, which say so."""
    cls = adapter_classes.of_target(row[4])
    dense = cls.factors is adapter_classes.Parametrisation.factors
    return lorax.adapt(fn, on_merge="warn" if dense else "error")


def loss_of(fn):
    return lambda params, x: jnp.sum(fn(params, x) ** 2)


def test_the_plugin_is_registered_by_being_imported():
    assert adapter_classes.REGISTRY["walsh"] is methods.Walsh
    assert inits.REGISTRY["cosines"].make is methods.cosines


def test_every_class_has_a_row():
    made = {type(a) for row in ADAPTERS for a in make(row)[1].values()}
    assert made == set(adapter_classes.REGISTRY.values())


def compiled(function, *args):
    """The result of a jitted function, compiled as quickly as XLA can."""
    lowered = jax.jit(function).lower(*args)
    return lowered.compile({"xla_backend_optimization_level": 0})(*args)


TRANSFORMS = {
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "vmap": lambda f: (
        lambda adapters, *rest: jax.vmap(f, (0, None, None))(
            jax.tree.map(lambda v: jnp.stack([v, -v, 2 * v, 0 * v]), adapters), *rest
        )
    ),
    "scan": lambda f: (
        lambda adapters, params, x: jax.lax.scan(
            lambda total, x: (total + f(adapters, params, x[None]), None), 0.0, x
        )[0]
    ),
}


def covering():
    """Every transformation for a class's first row; one each, in turn, for the others.

    So every class and every program of the table meets every transformation.
    """
    classes, turns = set(), itertools.cycle(("vmap", "scan", "remat"))
    for row in ADAPTERS:
        cls = adapter_classes.of_target(row[4])
        for name in (next(turns),) if cls in classes else TRANSFORMS:
            marks = () if every_version(row) else pytest.mark.once
            yield pytest.param(row, name, id=f"{row[0]}-{name}", marks=marks)
        classes.add(cls)


@pytest.mark.parametrize("row,name", [*covering()])
def test_adapt_is_merge_then_apply(row, name):
    """In value and gradient, under transformations and jit, and nothing is merged."""
    fn, adapters, params = make(row)
    sides = adapt(row, loss_of(fn)), programs.definition(loss_of(fn))

    def both(*args):
        total = lambda f: lambda *args: jnp.sum(TRANSFORMS[name](f)(*args))
        return [jax.value_and_grad(total(f))(*args) for f in sides]

    assert_close(*compiled(both, adapters, params, X))


@pytest.mark.parametrize("row", FIRST, ids=[row[0] for row in FIRST])
def test_adapt_is_merge_then_apply_eagerly(row):
    fn, adapters, params = make(row)
    got = adapt(row, fn)(adapters, params, X)
    assert_close(got, fn(lorax.merge(adapters, params), X))


@rows
def test_bf16_is_as_good_as_merging(row):
    """Error against float64 at most 1.5 x that of the merged kernel, plus one ulp."""
    fn, adapters, params = make(row, jnp.bfloat16, 0.1)
    x = X.astype(jnp.bfloat16)
    sides = adapt(row, fn), programs.definition(fn)
    both = lambda *args: [side(*args) for side in sides]
    adapted, merged = compiled(both, adapters, params, x)
    assert adapted.dtype == merged.dtype == jnp.bfloat16
    wide = lambda v: (
        np.asarray(v, np.float64) if jnp.issubdtype(v.dtype, jnp.floating) else v
    )
    with jax.enable_x64(True):
        args = jax.tree.map(wide, (adapters, params, x))
        exact = np.asarray(compiled(programs.definition(fn), *args))
    error = lambda y: np.abs(np.asarray(y, np.float64) - exact).max()
    ulp = 2.0 ** (np.floor(np.log2(np.abs(exact).max())) - 7)
    assert error(adapted) <= 1.5 * error(merged) + ulp


@rows
def test_every_array_is_trainable_and_has_a_role(row):
    for path, adapter in make(row)[1].items():
        fields = dataclasses.fields(adapter)
        arrays = {f.name for f in fields if f.metadata.get("pytree_node", True)}
        arrays -= {n for n, f in type(adapter).fields.items() if f.optional}
        arrays |= set(adapter.fields)
        frozen = {name for name, field in adapter.fields.items() if field.frozen}
        assert set(adapter.roles) == arrays - frozen, path
        assert len(jax.tree.leaves(adapter)) == len(adapter.roles)
        for field in {f.name for f in fields} - arrays:  # static fields are hashable
            hash(getattr(adapter, field))


@rows
def test_an_adapter_is_a_pytree(row):
    _, adapters, _ = make(row)
    leaves, treedef = jax.tree.flatten(adapters)
    again = treedef.unflatten(leaves)
    assert jax.tree.structure(again) == treedef and hash(treedef) == hash(treedef)
    for path, adapter in adapters.items():
        statics = lambda a: {
            f.name: getattr(a, f.name)
            for f in dataclasses.fields(a)
            if f.name not in a.roles
        }
        assert statics(again[path]) == statics(adapter)
    gradients = jax.tree.map(jnp.zeros_like, adapters)
    assert jax.tree.structure(gradients) == treedef
    with pytest.raises(dataclasses.FrozenInstanceError):
        adapters["w"].a = None


@rows
def test_delta_and_merge_agree_and_merge_keeps_the_tree(row):
    _, adapters, params = make(row)
    merged = lorax.merge(adapters, params)
    adapters, params = in_place(adapters, params)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    for path, leaf in params.items():
        if path not in adapters:
            assert merged[path] is leaf, "other leaves pass untouched"
            continue
        delta = adapters[path].delta(leaf)
        assert delta.shape == leaf.shape and merged[path].dtype == leaf.dtype
        np.testing.assert_allclose(merged[path], leaf + delta, rtol=1e-6, atol=1e-6)
        assert np.abs(delta).max() > 0.01
    subset = adapters["w"].layers if hasattr(adapters["w"], "layers") else None
    if subset is not None:
        np.testing.assert_array_equal(merged["w"][1], params["w"][1])


@rows
def test_merge_rounds_once(row):
    """A bf16 kernel gets the float32 sum, rounded; the reference is numpy's."""
    _, adapters, params = make(row, jnp.bfloat16)
    merged = lorax.merge(adapters, params)["w"]
    adapters, params = in_place(adapters, params)
    kernel, adapter = params["w"], adapters["w"]
    exact = np.asarray(kernel, np.float32) + np.asarray(adapter.delta(kernel))
    assert adapter.delta(kernel).dtype == jnp.float32
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged, exact.astype(jnp.bfloat16))


@rows
def test_abstract_init_has_the_real_shapes(row):
    _, fn, _, _, target = row
    _, adapters, params = make(row)
    params, _ = tree.split(params)
    kernels = lorax.discover(fn, params, X)
    abstract = jax.eval_shape(
        lambda key, params: lorax.init(key, params, target, kernels)[0], KEY, params
    )
    shapes = lambda tree: jax.tree.map(lambda v: (v.shape, v.dtype), tree)
    assert shapes(abstract) == shapes(adapters)


# (name, options, moves) of every init: the kernel may move, the merged kernel not
INITS = [
    ("standard", (), False),
    ("gaussian", (), False),
    ("gaussian", {"zero": "a"}, False),
    ("pissa", (), False),
    ("pissa", {"iterations": 2}, False),
    ("olora", (), False),
    ("lora_ga", {"scale": "gd"}, False),
    ("lora_one", (), True),
    ("lora_sb", (), True),
    ("eva", (), False),
    ("corda", (), False),
    ("milora", (), False),
    ("orthogonal", (), False),
    ("cosines", (), False),  # of tests/plugin
]
init_rows = pytest.mark.parametrize(
    "name,options,moves", INITS, ids=[f"{row[0]}{i}" for i, row in enumerate(INITS)]
)
KERNEL_ROWS = [row for row in ADAPTERS if not row[0].startswith("full")]


def initialised(row, init, key=KEY, others=(), dtype=jnp.float32):
    _, fn, shape, bias, target = row
    params = {"w": programs.normal(1, *shape), "bias": programs.normal(2, bias)}
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    kernels = lorax.discover(fn, params, X.astype(dtype))
    options = dict(target.options) | dict(init[1])
    target = dataclasses.replace(target, init=init[0], options=options)
    targets, stats = [*others, target], None
    if inits.REGISTRY[init[0]].stats:
        args = loss_of(fn), params, targets, [X.astype(dtype)], kernels
        stats = lorax.calibrate(KEY, *args)
    return params, lorax.init(key, params, targets, kernels, stats)


def test_every_init_has_a_row():
    assert {row[0] for row in INITS} == set(inits.REGISTRY)


# These work on flattened matrices: a stack, a window and each known class suffice.
FLAT = ("eva", "corda", "milora", "orthogonal", "cosines")
FEW = ("lora", "lora_stacked", "lora_conv", "dora", "adalora")


def fits(row, name):
    """Whether an init applies to a row's adapter, with room for its rank."""
    room = name != "lora_ga" or row[4].rank <= 2
    room &= name != "orthogonal" or row[4].rank % 2 == 0
    room &= name == "standard" or row[4].slices is None
    room &= name not in FLAT or row[0] in FEW
    calls = inits.REGISTRY[name].calls
    return room and (calls is None or hasattr(adapter_classes.of_target(row[4]), calls))


@pytest.mark.parametrize(
    "row,name,options,moves",
    [
        pytest.param(
            row,
            *init,
            id=f"{row[0]}-{init[0]}{i}",
            marks=() if row in FIRST else pytest.mark.once,
        )
        for row in KERNEL_ROWS
        for i, init in enumerate(INITS)
        if fits(row, init[0])
    ],
)
def test_at_init_the_merged_kernel_is_the_given_one(row, name, options, moves):
    params, (adapters, after) = initialised(row, (name, options))
    exact = not row[0].startswith("hra")  # its reflections cancel up to rounding
    exact = exact and name in ("standard", "gaussian")
    # under jit XLA rewrites DoRA's quotient of norms, up to rounding
    merged = (lorax.merge if exact else jax.jit(lorax.merge))(adapters, after)
    off = np.abs(merged["w"] - params["w"]).max() / np.abs(params["w"]).max()
    assert tree.flatten(after)["w"].dtype == params["w"].dtype
    assert (off > 1e-4) if moves else (off <= 1e-6)
    if exact:
        np.testing.assert_array_equal(merged["w"], params["w"])
    leaves = jax.tree.leaves(adapters)
    if not any(map(np.any, leaves)):  # a zero rotation has a gradient
        loss = lorax.adapt(loss_of(row[1]))
        leaves = jax.tree.leaves(jax.grad(loss)(adapters, after, X))
    assert any(map(np.any, leaves)), "a dead start"


@pytest.mark.parametrize("name,options", [row[:2] for row in INITS if not row[2]])
def test_in_bf16_the_start_is_within_one_rounding(name, options):
    """Of the kernel, and of the residual where the init stores one."""
    params, (adapters, after) = initialised(
        ADAPTERS[0], (name, options), dtype=jnp.bfloat16
    )
    wide = lambda x: np.asarray(x, np.float32)
    w, rest = wide(params["w"]), wide(after["w"])
    off = np.abs(wide(lorax.merge(adapters, after)["w"]) - w)
    assert (off <= 2.0**-8 * (np.abs(w) + np.abs(rest))).all()


@init_rows
def test_the_same_key_gives_the_same_adapter_whatever_else_is_adapted(
    name, options, moves
):
    row = next(row for row in ADAPTERS if fits(row, name))
    init = functools.partial(initialised, row, (name, options))
    _, (first, _) = init()
    _, (again, _) = init(others=[lorax.Target("bias", adapter="full")])
    assert list(again) == ["bias", "w"]
    jax.tree.map(np.testing.assert_array_equal, first["w"], again["w"])
    if name in (
        "standard",
        "gaussian",
        "orthogonal",
    ):  # the others draw nothing visible
        _, (other, _) = init(key=jax.random.key(1))
        leaves = zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True)
        assert any(np.any(one != two) for one, two in leaves)
        jitted = jax.jit(lambda key: init(key=key)[1][0])(KEY)
        np.testing.assert_allclose(first["w"].a, jitted["w"].a, rtol=1e-6)


def test_two_kernels_of_one_shape_differ():
    params = {"w1": jnp.ones((IN, OUT)), "w2": jnp.ones((IN, OUT))}
    adapters, _ = lorax.init(KEY, params, lorax.Target("w.", rank=2))
    assert np.any(adapters["w1"].a != adapters["w2"].a)


def test_the_standard_init_by_its_moments():
    """a uniform within 1/sqrt(in), b zero; for embeddings a is zero, b normal."""
    params = {"w": jnp.ones((400, 300)), "table": jnp.ones((300, 400))}
    fn = lambda params, ids: params["table"][ids] @ params["w"]
    kernels = lorax.discover(fn, params, jnp.arange(3))
    adapters, _ = lorax.init(KEY, params, lorax.Target(".*", rank=50), kernels)
    a, b = adapters["w"].a, adapters["w"].b
    assert not b.any() and np.abs(a).max() <= 1 / 20
    np.testing.assert_allclose(np.std(a), 1 / 20 / np.sqrt(3), rtol=0.02)
    a, b = adapters["table"].a, adapters["table"].b
    assert not a.any()
    np.testing.assert_allclose([np.mean(b), np.std(b)], [0, 1], atol=0.02)
