"""Meshes, rules and placements, against specs written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lorax
from lorax import optim, sharding, training
from lorax.interop import hf
from lorax.models import FAMILIES, gpt2, layers, llama, table


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({}, (1, 8, 1)),
        ({"data": -1, "fsdp": 2}, (4, 2, 1)),
        ({"fsdp": 2, "tensor": -1}, (1, 2, 4)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"fsdp": -1, "expert": 2, "context": 2}, (1, 2, 2, 2, 1)),
    ],
)
def test_mesh_sizes(given, want):
    mesh = sharding.make_mesh(**given)
    axes = ("data", "fsdp", "tensor") if len(want) == 3 else sharding.AXES
    assert tuple(mesh.shape.items()) == tuple(zip(axes, want, strict=True))
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert sorted(d.id for d in mesh.devices.flat) == list(range(8))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"fsdp": 3}, "fsdp=3.*3 devices do not fit the 8 there are"),
        ({"data": 3, "fsdp": -1}, "3 devices do not fit the 8"),
        ({"fsdp": 4}, "4 devices do not fit the 8"),
        ({"data": -1, "fsdp": -1}, "only one size can be -1"),
        ({"fsdp": 0}, "whole numbers >= 1"),
        ({"fsdp": 2.0}, "whole numbers >= 1"),
    ],
)
def test_meshes_that_are_none(given, said):
    with pytest.raises(ValueError, match=said):
        sharding.make_mesh(**given)


def test_explicit_axes_are_placed_by_the_same_rules():
    """A step under them keeps adapters and state where `state_shardings` puts them."""
    types = (AxisType.Explicit,) * 3
    explicit = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=types)
    params = {"w": jnp.linspace(-1.0, 1.0, 48).reshape(8, 6)}
    fn = lambda params, x: jnp.sum(jnp.tanh(x @ params["w"]) ** 2)
    x = jnp.cos(jnp.arange(32.0)).reshape(4, 8)
    made, params = lorax.init(
        jax.random.key(0), params, lorax.Target("w", 2, init="pissa")
    )
    tx = optim.lora_pro(0.1)
    state = training.create_state(jax.random.key(2), made, tx)
    step = training.make_train_step(training.simple_loss(fn), tx)
    want, _ = jax.jit(step)(state, params, x)
    placed = sharding.place(params, explicit, {"w": ("embed", "mlp")})
    assert placed.specs["w"] == P("fsdp", "tensor")
    with jax.set_mesh(explicit):
        where = sharding.state_shardings(state, placed)
        given = jax.device_put(state, where)
        params = jax.device_put(params, placed.tree(params))
        x = jax.device_put(x, sharding.batch_sharding(explicit))
        got, _ = jax.jit(step)(given, params, x)
    for new, old, alone in zip(
        *map(jax.tree.leaves, (got.adapters, given.adapters, want.adapters)),
        strict=True,
    ):
        assert jax.typeof(new) == jax.typeof(old)
        np.testing.assert_allclose(new, alone, rtol=1e-4, atol=1e-5)


def test_a_batch_is_cut_over_data_and_fsdp(mesh):
    placed = jax.device_put(jnp.arange(8), sharding.batch_sharding(mesh))
    assert placed.sharding.spec == P(("data", "fsdp"))
    assert {s.data.shape for s in placed.addressable_shards} == {(2,)}


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_logical_axes_and_the_report(mesh):
    params = {"q": {"w": shape(3, 8, 4, 6)}, "norm": {"s": shape(3, 7)}}
    logical = {
        "q/w": ("layers", "embed", "heads", "head_dim"),
        "norm/s": ("layers", None),
    }
    placed = sharding.place(params, mesh, logical)
    assert placed.specs == {
        "q/w": P(None, "fsdp", "tensor", None),
        "norm/s": P(None, None),
    }
    assert str(placed).splitlines() == [
        "leaf    shape         spec                  by",
        "norm/s  (3, 7)        (-, -)                layers, -",
        "q/w     (3, 8, 4, 6)  (-, fsdp, tensor, -)  layers, embed, heads, head_dim",
    ]
    abstract = placed.abstract(params)
    assert abstract["q"]["w"].sharding.shard_shape((3, 8, 4, 6)) == (3, 4, 2, 6)


def test_two_logical_axes_on_one_mesh_axis_the_first_has_it(mesh):
    logical = {"w": ("mlp", "vocab")}
    assert sharding.place({"w": shape(4, 4)}, mesh, logical).specs["w"] == P(
        "tensor", None
    )
    both = {"mlp": ("fsdp", "tensor"), "vocab": ("tensor", "data")}
    placed = sharding.place({"w": shape(4, 4)}, mesh, logical, table=both)
    assert placed.specs["w"] == P(("fsdp", "tensor"), "data")


def test_regular_expressions_come_first_and_the_first_of_them_wins(mesh):
    params = {"a": {"w": shape(4)}, "b": {"w": shape(4)}, "c": shape(4)}
    rules = [("b/w", P("data")), (".*/w", P("tensor")), ("w", P("fsdp"))]
    with pytest.raises(ValueError, match="rule 'w' matches no leaf; nearest"):
        sharding.place(params, mesh, rules=rules)
    placed = sharding.place(params, mesh, {"c": ("embed",)}, rules[:2])
    assert placed.specs == {"a/w": P("tensor"), "b/w": P("data"), "c": P("fsdp")}
    assert [row.rule for row in placed.rows] == [".*/w", "b/w", "embed"]


@pytest.mark.parametrize(
    ("logical", "rules", "said"),
    [
        ({"w": ("heads", None)}, (), r"w: axis 0 \(heads\) of the shape \(3, 4\) has"),
        ({"w": ("heads", None)}, (), r"may_replicate=\('heads',\)"),
        ({}, [("w", P(None, ("data", "fsdp", "tensor")))], "axis 1 .* has size 4"),
        ({}, [("w", P(None, "experts"))], "the mesh has no axis 'experts'"),
        ({}, [("w", P(None, None, None))], "more entries than the shape"),
        ({}, (), r"w: no sharding rule matches; end the rules with \('\.\*'"),
        ({"w": ("heads",)}, (), "logical axes .* fit the shape"),
        ({"w": ("head", None)}, (), "'head' is not in the table; it has layers, embed"),
    ],
)
def test_rules_that_do_not_fit(mesh, logical, rules, said):
    with pytest.raises(ValueError, match=said):
        sharding.place({"w": shape(3, 4)}, mesh, logical, rules)


def test_an_axis_may_be_left_whole_where_that_is_said(mesh):
    logical = {"w": ("kv_heads", "mlp")}
    placed = sharding.place(
        {"w": shape(3, 4)}, mesh, logical, may_replicate=["kv_heads"]
    )
    assert placed.specs["w"] == P(None, "tensor")  # the free mesh axis goes on


def test_every_family_has_a_mesh_axis_for_all_its_logical_axes():
    for family in {id(f): f for f in FAMILIES.values()}.values():
        config = family.Config()
        named = table.logical_axes(family.entries(config), config.stacks, config.scan)
        used = {axis for axes in named.values() for axis in axes} - {None}
        assert used <= set(sharding.LOGICAL), family.__name__


def test_activations_are_cut_along_their_batch_under_a_mesh(mesh):
    cut = jax.jit(layers.along_batch)
    x = jnp.ones((8, 6))
    assert cut(x).sharding.is_fully_replicated  # no mesh is set: does nothing
    placed = jax.device_put(x, NamedSharding(mesh, P(None, "fsdp")))
    with jax.set_mesh(mesh):
        assert cut(placed).sharding.spec == P(("data", "fsdp"))
        odd = jax.device_put(jnp.ones((3, 6)), sharding.replicated(mesh))
        assert cut(odd).sharding.is_fully_replicated  # 4 do not divide 3
    other = Mesh(mesh.devices, ("x", "y", "z"), axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(other):
        text = jax.jit(layers.along_batch).lower(shape(8, 6)).as_text()
    assert "sharding_constraint" not in text


def test_a_model_of_another_family_is_placed(mesh):
    config = gpt2.Config(vocabulary=12, width=8, layers=2, heads=2, hidden=16)
    model = gpt2.Model(config)
    tokens = jnp.zeros((1, 2), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    named = table.logical_axes(gpt2.entries(config), config.stacks, config.scan)
    specs = sharding.place(params, mesh, named).specs
    assert specs["layers/qkv/kernel"] == P(None, "fsdp", None, "tensor", None)
    assert specs["layers/down/kernel"] == P(None, "tensor", "fsdp")
    assert specs["embed/embedding"] == P("tensor", "fsdp")


def test_llama_adapters_by_hand(mesh):
    config = llama.Config(
        vocabulary=12, width=8, layers=2, heads=4, kv_heads=2, head_dim=4, hidden=16
    )
    model = llama.Model(config)
    tokens = jnp.zeros((2, 3), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    loss_fn = lambda params, tokens: model.apply({"params": params}, tokens).sum()
    kernels = lorax.discover(loss_fn, params, tokens)
    adapters = jax.eval_shape(
        lambda key, p: lorax.init(key, p, lorax.Target("all-linear", 2), kernels)[0],
        jax.random.key(0),
        params,
    )
    named = table.logical_axes(llama.entries(config), config.stacks, config.scan)
    placed = sharding.place(params, mesh, named)
    made = sharding.adapter_specs(adapters, placed.specs)
    assert made["layers/o/kernel"].a == P(None, "tensor", None, None)
    assert made["layers/o/kernel"].b == P(None, None, "fsdp")
    assert made["layers/down/kernel"].a == P(None, "tensor", None)


def test_a_checkpoint_is_read_into_its_placement(mesh, tmp_path):
    config = llama.Config(
        vocabulary=12, width=8, layers=2, heads=4, kv_heads=2, head_dim=4, hidden=16
    )
    model = llama.Model(config)
    tokens = jnp.zeros((1, 2), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    hf.save(tmp_path, config, params)
    named = table.logical_axes(llama.entries(config), config.stacks, config.scan)
    place = lambda shapes: sharding.place(shapes, mesh, named).tree(shapes)
    _, loaded = hf.load(tmp_path, shardings=lambda _, shapes: place(shapes))
    want = place(params)
    same = jax.tree.map(
        lambda x, y, where: (
            x.sharding.is_equivalent_to(where, x.ndim) and bool((x == y).all())
        ),
        loaded,
        params,
        want,
    )
    assert all(jax.tree.leaves(same))
