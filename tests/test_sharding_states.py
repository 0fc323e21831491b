"""Shardings of adapters and optimiser state, against specs written by hand."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lorax import optim, sharding, training
from lorax.adapters import AdaLora, Dora, Full, Lora
from lorax.optim import _states
from lorax.optim._lora_pro_moments import ScaleByRowColState
from lorax.sharding import states
from lorax.types import Axes


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(data=2, fsdp=2, tensor=2)


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


AXES = Axes((1,), (2, 3), (0,))
KERNEL = P(None, "fsdp", "tensor", None)


def low_rank(name):
    a, b = jnp.ones((3, 8, 2)), jnp.ones((3, 2, 4, 6))
    return {
        "lora": Lora(a, b, 1.0, AXES),
        "dora": Dora(a, b, jnp.ones((3, 4, 6)), 1.0, AXES),
        "adalora": AdaLora(a, jnp.ones((3, 2)), b, 1.0, AXES),
        "full": Full(jnp.ones((3, 8, 4, 6))),
    }[name]


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("lora", [P(None, "fsdp", None), P(None, None, "tensor", None)]),
        (
            "dora",
            [
                P(None, "fsdp", None),
                P(None, None, "tensor", None),
                P(None, "tensor", None),
            ],
        ),
        (
            "adalora",
            [P(None, "fsdp", None), P(None, None), P(None, None, "tensor", None)],
        ),
        ("full", [KERNEL]),
    ],
)
def test_factors_lie_as_their_kernel(name, want):
    found = sharding.adapter_specs({"w": low_rank(name)}, {"w": KERNEL})
    leaves = jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, P))
    assert leaves == want
    whole = sharding.adapter_specs({"w": low_rank(name)}, {"w": KERNEL}, True)
    assert set(jax.tree.leaves(whole, is_leaf=lambda x: isinstance(x, P))) == {P()}
    with pytest.raises(KeyError, match="the placement has no leaf 'w'"):
        sharding.adapter_specs({"w": low_rank(name)}, {})


@pytest.mark.parametrize(
    ("name", "want"),
    [
        # a [3, 8, 2]: 8 rows over fsdp, then data and tensor; b [3, 2, 4, 6]: 4 heads
        # over tensor, then 6 over data; of what is left, fsdp divides only the heads
        (
            "lora",
            [
                P(None, ("fsdp", "data", "tensor"), None),
                P(None, None, ("tensor", "fsdp"), "data"),
            ],
        ),
        (
            "dora",
            [
                P(None, ("fsdp", "data", "tensor"), None),
                P(None, None, ("tensor", "fsdp"), "data"),
                P(None, ("tensor", "fsdp"), "data"),
            ],
        ),
        ("full", [KERNEL]),
    ],
)
def test_factors_are_cut_along_the_axes_that_are_left(name, want, mesh):
    adapters = {"w": low_rank(name)}
    lying = sharding.adapter_specs(adapters, {"w": KERNEL})
    found = sharding.spread_specs(adapters, lying, mesh)
    leaves = jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, P))
    assert leaves == want
    explicit = jax.make_mesh(
        (2, 2, 2), mesh.axis_names, axis_types=(AxisType.Explicit,) * 3
    )
    assert sharding.spread_specs(adapters, lying, explicit) == lying


def test_how_a_state_is_cut(mesh, monkeypatch):
    lora, tx = low_rank("lora"), optax.adam(0.1)
    state = training.create_state(jax.random.key(0), {"w": lora}, tx)
    placed = placed_of({"w": shape(3, 8, 4, 6)}, mesh)
    cuts = {c: sharding.state_shardings(state, placed, c) for c in sharding.CUTS}
    assert cuts["auto"] == cuts["kernels"] != cuts["all"]  # it is small
    assert cuts["all"].opt_state[0].mu == cuts["all"].adapters
    assert cuts["whole"].adapters["w"].a.spec == P()
    # 48 and 144 elements, each with two moments, in float32
    held = lambda where: states._held(state, where)
    assert held(cuts["whole"]) == 3 * 4 * (48 + 144) + 4
    assert held(cuts["kernels"]) == 3 * 4 * (48 // 2 + 144 // 2) + 4
    assert held(cuts["all"]) == 3 * 4 * (48 + 144) // 8 + 4
    monkeypatch.setattr(states, "WORTH", 1)
    assert sharding.state_shardings(state, placed) == cuts["all"]
    with pytest.raises(ValueError, match="cut='half'; choose one of auto, kernels, a"):
        sharding.state_shardings(state, placed, "half")


def test_factors_of_some_layers_and_of_a_population():
    lora = low_rank("lora")
    stacked = P("data", "fsdp", "tensor", None)
    one = lora.replace(a=lora.a[1:2], b=lora.b[1:2], layers=(1,))
    made = sharding.adapter_specs({"w": one}, {"w": stacked})["w"]
    assert made.a == P(None, "fsdp", None)
    many = jax.tree.map(lambda x: jnp.stack([x] * 5), lora)
    made = sharding.adapter_specs({"w": many}, {"w": stacked})["w"]
    assert made.b == P(None, "data", None, "tensor", None)


def placed_of(params, mesh):
    logical = {"w": ("layers", "embed", "heads", "head_dim")}
    return sharding.place(params, mesh, logical)


def specs_of(tx, adapter, mesh):
    """The optimiser's state for one adapter, as specs."""
    state = training.create_state(jax.random.key(0), {"w": adapter}, tx)
    placed = placed_of({"w": shape(3, 8, 4, 6)}, mesh)
    where = sharding.state_shardings(state, placed)
    assert jax.tree.structure(where) == jax.tree.structure(state)
    jax.device_put(state, where)  # every sharding fits its leaf
    return jax.tree.map(lambda place: place.spec, where)


A, B = P(None, "fsdp", None), P(None, None, "tensor", None)


def test_moments_follow_their_factor_and_counters_are_whole(mesh):
    tx = optax.MultiSteps(optax.adamw(optax.linear_schedule(1.0, 0.0, 9)), 2)
    found = specs_of(tx, low_rank("dora"), mesh).opt_state
    (adam,) = _states.states(found, optax.ScaleByAdamState)
    for tree in (adam.mu["w"], adam.nu["w"], found.acc_grads["w"]):
        assert (tree.a, tree.b) == (A, B)
        assert tree.magnitude == P(None, "tensor", None)
    assert adam.count == found.mini_step == P()


def test_adalora_keeps_its_masks_with_lam(mesh):
    tx = optim.adalora(
        optax.sgd(0.1),
        target_budget=3,
        total_steps=9,
        initial_warmup=1,
        final_steps=1,
        interval=1,
    )
    found = specs_of(tx, low_rank("adalora"), mesh).opt_state
    assert found.sensitivity["w"].p == found.uncertainty["w"].p == A
    assert found.mask["w"] == P(None, None) and found.budget == P()


def test_states_of_other_shapes(mesh):
    rowcol = specs_of(optim.lora_pro(0.1, "rowcol"), low_rank("lora"), mesh).opt_state
    (means,) = _states.states(rowcol, ScaleByRowColState)
    assert means.rows["w"] == P(None, "fsdp")
    assert means.columns["w"] == P(None, "tensor", None)
    full = specs_of(optim.lora_pro(0.1, "full"), low_rank("lora"), mesh).opt_state
    dense = [
        leaf
        for leaf in jax.tree.leaves(full, is_leaf=lambda x: isinstance(x, P))
        if leaf != P()
    ]
    assert dense and set(dense) == {P(None, "fsdp", "tensor")}
    rite = specs_of(optim.lora_rite(0.1), low_rank("lora"), mesh).opt_state
    (kept,) = _states.states(rite, optim.ScaleByLoraRiteState)
    for both in (kept.basis["w"], kept.momentum["w"]):
        assert both == (A, B)
    assert {*kept.second["w"], *kept.escaped["w"], kept.count} == {P()}


def test_what_fits_several_places_is_whole(mesh):
    square = Lora(jnp.ones((8, 2)), jnp.ones((2, 8)), 1.0, Axes((0,), (1,)))
    tx = optim.lora_pro(0.1, "rowcol")
    state = training.create_state(jax.random.key(0), {"w": square}, tx)
    placed = sharding.place({"w": shape(8, 8)}, mesh, {"w": ("embed", "mlp")})
    where = sharding.state_shardings(state, placed)
    specs = {place.spec for place in jax.tree.leaves(where.opt_state)}
    assert specs == {P()}
    assert where.adapters["w"].a.spec == P("fsdp", None)
