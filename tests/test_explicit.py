"""Explicit meshes: adapt is merge-then-apply, and shardings are as specified."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorax
from lorax import inits
from lorax.adapters import AdaLora, Dora, Lora
from tests import explicit_programs, programs
from tests.optim import rows

FAST = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)


def put(mesh, x, spec):
    return jax.device_put(np.asarray(x), NamedSharding(mesh, spec))


def problem(name, kind, mesh):
    """A function, perturbed adapters, its arguments, and how it uses them."""
    fn, params, x, x_spec = explicit_programs.PROGRAMS[name]()
    params = {path: put(mesh, leaf, spec) for path, (leaf, spec) in params.items()}
    x = put(mesh, x, x_spec)
    stacked = (0,) if name == "experts" else None
    target = lorax.Target("[wuv]", rank=2, alpha=4, adapter=kind, batch_axes=stacked)
    kernels = lorax.discover(fn, params, x)
    made, params = lorax.init(jax.random.key(0), params, target, kernels)
    return fn, programs.perturbed(made), params, x, kernels


ROWS = [(name, "dora") for name in explicit_programs.PROGRAMS]  # LoRA's and a gain
ROWS += [("unreduced", "lora"), ("layers", "lora"), ("mapped_shards", "adalora")]


@pytest.mark.parametrize(("name", "kind"), ROWS)
def test_adapt_is_merge_then_apply(name, kind, mesh):
    with jax.set_mesh(mesh), warnings.catch_warnings():
        warnings.simplefilter("error", lorax.MergeWarning)
        fn, adapters, params, x, kernels = problem(name, kind, mesh)
        assert all(kernel.axes for path, kernel in kernels.items() if path != "bias")
        sides = lorax.adapt(fn), programs.definition(fn)
        both = lambda *args: [jax.value_and_grad(side)(*args) for side in sides]
        got, want = (
            jax.jit(both).lower(adapters, params, x).compile(FAST)(adapters, params, x)
        )
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = float(np.abs(w).max())
        np.testing.assert_allclose(g, w, rtol=0, atol=2e-5 * scale)
    alike = jax.tree.map(lambda g, a: jax.typeof(g) == jax.typeof(a), got[1], adapters)
    assert all(jax.tree.leaves(alike))


@pytest.mark.parametrize("layers", [None, (0, 2)])
@pytest.mark.parametrize("kind", ["lora", "dora", "adalora"])
def test_merge_by_hand(kind, layers, mesh):
    """W0 + 2 a b of a stack sharded along both its matrix axes, in numpy."""
    leaf = np.random.RandomState(0).randn(3, 8, 6).astype(np.float32)
    with jax.set_mesh(mesh):
        params = {"w": put(mesh, leaf, P(None, "x", "y"))}
        kernel = lorax.Kernel(
            "w", (3, 8, 6), jnp.dtype("float32"), "dot", lorax.Axes((1,), (2,), (0,))
        )
        target = lorax.Target("w", 2, alpha=4, adapter=kind, layers=layers)
        made, params = lorax.init(jax.random.key(0), params, target, {"w": kernel})
        adapters = programs.perturbed(made)
        merged = lorax.merge(adapters, params)["w"]
    assert jax.typeof(merged) == jax.typeof(params["w"])
    own = jax.tree.map(np.asarray, adapters["w"])
    read, write = (own.p, own.q) if kind == "adalora" else (own.a, own.b)
    read = read * own.lam[:, None] if kind == "adalora" else read
    want = leaf.astype(np.float64)
    for i, layer in enumerate(layers or range(3)):
        want[layer] += 2 * read[i].astype(np.float64) @ write[i]
        if kind == "dora":
            want[layer] *= own.magnitude[i] / np.linalg.norm(want[layer], axis=0)
    np.testing.assert_allclose(merged, want, rtol=1e-5, atol=1e-5)


def test_a_mesh_of_one_device():
    """Flattening on a single CPU device states that its result is replicated."""
    one = jax.make_mesh(
        (1, 1),
        ("x", "y"),
        axis_types=(AxisType.Explicit,) * 2,
        devices=jax.devices()[:1],
    )
    w, x = programs.normal(1, 4, 2, 3), programs.normal(0, 2, 5, 4)
    fn = lambda params, x: jnp.sum(
        jnp.einsum("btd,dhk->bthk", x, params["w"], out_sharding=P("x", None, "y")) ** 2
    )
    with jax.set_mesh(one):
        params = {"w": put(one, w, P(None, "y"))}
        x = put(one, x, P("x"))
        kernels = lorax.discover(fn, params, x)
        made, params = lorax.init(
            jax.random.key(0), params, lorax.Target("w", 2), kernels
        )
        made = programs.perturbed(made)
        got = jax.grad(lorax.adapt(fn))(made, params, x)["w"]
        want = jax.grad(programs.definition(fn))(made, params, x)["w"]
    np.testing.assert_allclose(got.a, want.a, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got.b, want.b, rtol=1e-4, atol=1e-4)


def test_the_model_sees_the_shardings_of_its_leaves(mesh):
    """`discover` traces a function whose shard_map requires its kernel's sharding."""
    seen = []

    def fn(params, x):
        seen.append(jax.typeof(params["w"]).sharding.spec)
        body = lambda w, x: jax.lax.psum(x @ w, "x")
        body = jax.shard_map(body, in_specs=(P("x"), P(None, "x")), out_specs=P())
        return body(params["w"], x)

    with jax.set_mesh(mesh):
        params = {"w": put(mesh, programs.normal(1, 8, 4), P("x"))}
        x = put(mesh, programs.normal(0, 2, 8), P(None, "x"))
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=leaf.sharding
            ),
            (params, x),
        )
        found = [lorax.discover(fn, params, x), lorax.discover(fn, *shapes)]
        inside = jax.jit(lambda p, x: lorax.discover(fn, p, x)["w"].axes.in_[0])
        assert int(inside(params, x)) == 0
    assert {kernels["w"].axes for kernels in found} == {lorax.Axes((0,), (1,))}
    assert set(seen) == {P("x", None)}


STACK = lorax.Axes((1,), (2, 3), (0,))
SPECS = {"a": P(None, "x"), "p": P(None, "x"), "b": P(None, None, None, "y")}
SPECS |= {"q": SPECS["b"], "lam": P(), "magnitude": P(None, None, "y")}


def sharded(mesh, adapters):
    """Adapters whose factors are sharded like a kernel with specs (-, x, -, y)."""
    where = lambda keys, x: put(mesh, x, SPECS[jax.tree_util.keystr(keys[-1:])[1:]])
    return jax.tree_util.tree_map_with_path(where, adapters)


@pytest.mark.parametrize("row", rows.ROWS, ids=lambda row: row.name)
def test_optimisers_step_as_on_one_device(row, mesh):
    """Values, and the types of updates and state, which a step does not change."""
    a, b = programs.normal(1, 3, 8, 2), programs.normal(2, 3, 2, 2, 6)
    adapters = {"lora": Lora(a, b, 2.0, STACK)}
    adapters["dora"] = Dora(a, b, 1 + programs.normal(3, 3, 2, 6) ** 2, 2.0, STACK)
    if row.adalora:
        adapters["svd"] = AdaLora(a, programs.normal(4, 3, 2), b, 2.0, STACK)
    grads = programs.filled(adapters)
    base = {path: programs.normal(5, 3, 8, 2, 6) for path in adapters}
    tx = optax.with_extra_args_support(row.make(**row.kwargs))
    step = lambda grads, state, adapters, base: tx.update(
        grads, state, adapters, base=base, **row.extra
    )
    want, _ = jax.jit(step)(grads, tx.init(adapters), adapters, base)
    with jax.set_mesh(mesh):
        base = {path: put(mesh, w, P(None, "x", None, "y")) for path, w in base.items()}
        adapters, grads = sharded(mesh, adapters), sharded(mesh, grads)
        before = tx.init(adapters)
        got, after = jax.jit(step)(grads, before, adapters, base)
    for new, alone, old in zip(*map(jax.tree.leaves, (got, want, grads)), strict=True):
        assert jax.typeof(new) == jax.typeof(old)
        np.testing.assert_allclose(new, alone, rtol=2e-3, atol=2e-5)
    kinds = lambda tree: [jax.typeof(x) for x in jax.tree.leaves(tree)]
    assert kinds(after) == kinds(before)


@pytest.mark.parametrize(
    ("init", "kind", "options"),
    [
        ("pissa", "dora", ()),
        ("pissa", "adalora", (("iterations", 8),)),
        ("olora", "lora", ()),
        ("lora_ga", "lora", (("norm_clip", True),)),
        ("eva", "lora", ()),
        ("corda", "lora", ()),
    ],
)
def test_inits_read_sharded_kernels(init, kind, options, mesh):
    """The same adapter as on one device; merging restores kernel and sharding."""
    leaf = programs.normal(1, 3, 8, 2, 6)
    target = lorax.Target("w", 2, adapter=kind, init=init, options=dict(options))

    def fn(params, x):
        y = jnp.einsum("ltd,ldhk->lthk", x, params["w"], out_sharding=where)
        return jnp.sum(jnp.tanh(y) ** 2)

    def made(params, x):
        kernels = lorax.discover(fn, params, x)
        stats = None
        if inits.REGISTRY[init].stats:
            given = jax.random.key(1), fn, params, target, [x], kernels
            stats = lorax.calibrate(*given)
        return lorax.init(jax.random.key(0), params, target, kernels, stats)

    x, where = programs.normal(2, 3, 4, 8), None
    want, _ = made({"w": leaf}, x)
    with jax.set_mesh(mesh):
        params, where = {"w": put(mesh, leaf, P(None, "x", None, "y"))}, P(None, None)
        adapters, moved = made(params, put(mesh, x, P(None, "x")))
        merged = lorax.merge(adapters, moved)["w"]
    assert jax.typeof(merged) == jax.typeof(params["w"])
    np.testing.assert_allclose(merged, leaf, rtol=1e-4, atol=1e-4)
    for one, many in zip(*map(jax.tree.leaves, (want, adapters)), strict=True):
        np.testing.assert_allclose(many, one, rtol=2e-3, atol=2e-3)


def test_slices_of_a_sharded_kernel(mesh):
    leaf, x = programs.normal(1, 8, 3, 4), programs.normal(0, 8, 8)
    fn = lambda params, x: jnp.sum(
        jnp.tanh(jnp.einsum("td,dqe->tqe", x, params["w"], out_sharding=P("x"))) ** 2
    )
    with jax.set_mesh(mesh):
        params = {"w": put(mesh, leaf, P("x", None, "y"))}
        x = put(mesh, x, P("x"))
        kernels = lorax.discover(fn, params, x)
        target = lorax.Target("w", 2, slices=(0, 2))
        made, params = lorax.init(jax.random.key(0), params, target, kernels)
        made = programs.perturbed(made)
        own = made["w"]
        spread = own.replace(
            a=put(mesh, own.a, P(None, "x")), b=put(mesh, own.b, P(None, None, "y"))
        )
        got = [
            jax.grad(lorax.adapt(fn))({"w": a}, params, x)["w"] for a in (own, spread)
        ]
        merged = lorax.merge({"w": spread}, params)["w"]
    want = np.array(leaf, np.float64)
    for i, slot in enumerate((0, 2)):
        want[:, slot] += own.scale * np.asarray(own.a)[i] @ np.asarray(own.b)[i]
    np.testing.assert_allclose(merged, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[0].a, got[1].a, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got[0].b, got[1].b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", list(AxisType))
def test_dropout_on_a_mesh(kind):
    """Every shard of a `shard_map` draws its own mask; elsewhere one is drawn."""
    axis = AxisType.Explicit if kind is AxisType.Explicit else AxisType.Auto
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis,))
    copies = lorax.Lora(
        jnp.eye(16), jnp.eye(16), 1.0, lorax.Axes((0,), (1,)), dropout=0.5
    )
    params, key = {"w": jnp.zeros((16, 16))}, jax.random.key(3)
    fn = lambda params, x: x @ params["w"]
    alone = lorax.adapt(fn)({"w": copies}, params, jnp.ones((8, 16)), lora_key=key)
    if kind is AxisType.Manual:
        specs = {"in_specs": (P(), P("x")), "out_specs": P("x")}
        shards = jax.shard_map(lambda w, x: x @ w, mesh=mesh, **specs)
        fn = lambda params, x: shards(params["w"], x)
    with jax.set_mesh(mesh):
        x = put(mesh, jnp.ones((8, 16)), P("x"))
        params = {"w": put(mesh, params["w"], P())}
        run = jax.jit(lambda a, p, x: lorax.adapt(fn)(a, p, x, lora_key=key))
        found = np.asarray(run({"w": copies}, params, x))  # a row per device
    assert set(np.unique(found)) == {0.0, 2.0}
    assert len(np.unique(found, axis=0)) == 8
    if kind is not AxisType.Manual:
        np.testing.assert_array_equal(found, alone)
