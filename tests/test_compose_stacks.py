"""Stacking, unstacking and hot-swapping adapter sets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax import compose
from tests import adapter_sets as make
from tests.programs import normal

CONV = {"in_": (3, 4), "out": (5,)}
STACK = {"batch": (3,), "in_": (6,), "out": (2, 2)}


def full(seed, *shape):
    return lorax.Full(normal(seed, *(shape or (5,))))


def test_a_stack_by_hand():
    axes = lorax.Axes((0,), (1,))
    one = lorax.Lora(jnp.array([[1.0], [2.0]]), jnp.array([[3.0]]), 2.0, axes)
    two = lorax.Lora(jnp.eye(2), jnp.array([[4.0], [5.0]]), 1.0, axes)
    stacked = compose.stack([{"w": one}, {"w": two}])["w"]
    assert stacked.scale == 2.0 and stacked.rank == 2
    assert stacked.a.tolist() == [[[1, 0], [2, 0]], [[1, 0], [0, 1]]]
    assert stacked.b.tolist() == [[[3], [0]], [[2], [2.5]]]


@pytest.mark.parametrize(
    "maker,shape",
    [
        (make.lora, {}),
        (make.lora, CONV),
        (make.lora, STACK),
        (make.adalora, STACK),
        (make.dora, {}),
        (make.dora, STACK),
    ],
)
def test_every_member_keeps_its_update_and_unstack_its_rank(maker, shape):
    sets = [
        {"w": maker(seed, rank, scale, **shape), "bias": full(seed)}
        for seed, rank, scale in [(1, 2, 1.5), (2, 4, 0.5), (3, 1, 3.0)]
    ]
    stacked = compose.stack(sets)
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(stacked))
    for k, own in enumerate(sets):
        member = jax.tree.map(lambda leaf: leaf[k], stacked)
        make.close(make.delta(member["w"]), make.delta(own["w"]), 1e-6)
        np.testing.assert_array_equal(member["bias"].value, own["bias"].value)
    for back, own in zip(compose.unstack(stacked), sets):
        assert back["w"].rank == own["w"].rank
        make.close(make.delta(back["w"]), make.delta(own["w"]), 1e-6)
        if maker is make.dora:
            np.testing.assert_array_equal(back["w"].magnitude, own["w"].magnitude)


def test_equal_scales_leave_the_factors_as_they_are():
    sets = [{"w": make.lora(seed, scale=0.3)} for seed in (1, 2)]
    for back, own in zip(compose.unstack(compose.stack(sets)), sets):
        jax.tree.map(np.testing.assert_array_equal, back, own)


def test_a_stack_runs_under_vmap_and_jit():
    sets = [{"w": make.lora(seed, rank)} for seed, rank in [(1, 1), (2, 3)]]
    params, x = {"w": normal(9, 6, 5)}, normal(8, 2, 6)
    adapted = lorax.adapt(lambda params, x: x @ params["w"], on_merge="error")
    run = lambda sets: jax.vmap(adapted, (0, None, None))(
        compose.stack(sets), params, x
    )
    want = [np.asarray(x) @ (params["w"] + make.delta(s["w"])) for s in sets]
    make.close(jax.jit(run)(sets), np.stack(want))


def test_an_untrained_rank_is_not_taken_for_padding():
    """b = 0 at the standard init, and lam = 0 of a pruned triplet, are real ranks."""
    lora = make.lora(1, 3)
    fresh = lora.replace(b=0 * lora.b)
    ada = make.adalora(1, 3)
    pruned = ada.replace(lam=ada.lam.at[2].set(0))
    wide = {"w": make.lora(2, 4), "v": make.adalora(2, 4)}
    back, _ = compose.unstack(compose.stack([{"w": fresh, "v": pruned}, wide]))
    assert back["w"].rank == back["v"].rank == 3


def test_missing_paths_become_zero_updates():
    sets = [{"w": make.lora(1), "v": make.adalora(2)}, {"w": make.lora(3, 1)}]
    stacked = compose.stack(sets, missing="zero")
    second = jax.tree.map(lambda leaf: leaf[1], stacked)
    assert not make.delta(second["v"]).any()
    make.close(make.delta(second["w"]), make.delta(sets[1]["w"]))
    first, back = compose.unstack(stacked)
    assert back["v"].rank == 1 and first["v"].rank == 2
    with pytest.raises(ValueError, match=r"set 1 has no adapter for \['v'\].*'zero'"):
        compose.stack(sets)
    for other in (make.dora(1), full(1)):
        with pytest.raises(
            ValueError, match=r"v: sets \[1\] lack it.*not a zero update"
        ):
            compose.stack([{"w": sets[0]["w"], "v": other}, sets[1]], missing="zero")


@pytest.mark.parametrize(
    "other,message",
    [
        (make.lora(2, in_=(7,)), r"w: set 0 has Lora with in \(6,\).*in \(7,\)"),
        (make.dora(2), r"w: set 0 has Lora.*set 1 Dora"),
        (make.lora(2, dropout=0.1), r"w: set 0 has dropout=0.0 .*dropout=0.1"),
        (make.lora(2, batch=(2,)), r"w: .*stack \(2,\)"),
    ],
)
def test_a_stack_of_different_adapters_is_refused(other, message):
    with pytest.raises(ValueError, match=message):
        compose.stack([{"w": make.lora(1)}, {"w": other}])


def test_layers_and_detach_norm_must_agree():
    two = lambda seed, layers: {"w": make.lora(seed, batch=(2,), layers=layers)}
    with pytest.raises(ValueError, match=r"layers \(0, 2\).*layers \(1, 2\)"):
        compose.stack([two(1, (0, 2)), two(2, (1, 2))])
    with pytest.raises(ValueError, match="w: set 0 has detach_norm=True"):
        compose.stack([{"w": make.dora(1)}, {"w": make.dora(2, detach_norm=False)}])


def test_what_is_no_list_of_sets_is_refused():
    with pytest.raises(TypeError, match=r"sets must be a list of adapter dicts"):
        compose.stack({"w": make.lora(1)})
    with pytest.raises(TypeError, match=r"got list of \['Lora'\]"):
        compose.stack([make.lora(1)])
    with pytest.raises(ValueError, match="sets is empty"):
        compose.stack([])
    with pytest.raises(ValueError, match="missing='one'; choose"):
        compose.stack([{"w": make.lora(1)}], missing="one")


def test_unstack_says_what_it_cannot_split():
    with pytest.raises(ValueError, match="no common leading axis"):
        compose.unstack({"w": make.lora(1)})
    stacked = compose.stack([{"w": make.lora(1)}, {"w": make.lora(2)}])
    with pytest.raises(ValueError, match="w: unstack looks.*outside jit"):
        jax.jit(compose.unstack)(stacked)
    closed_over = jax.jit(lambda: compose.unstack(stacked))()
    jax.tree.map(np.testing.assert_array_equal, closed_over, compose.unstack(stacked))


@pytest.mark.parametrize("maker", [make.lora, make.adalora, make.dora])
def test_a_switched_adapter_runs_in_the_compiled_function(maker):
    traces = []

    @jax.jit
    def fn(adapters, params, x):
        traces.append(0)
        return lorax.adapt(lambda p, x: x @ p["w"] + p["bias"])(adapters, params, x)

    params = {"w": normal(8, 6, 5), "bias": normal(7, 5)}
    x = normal(9, 3, 6)
    like = {"w": maker(1, 3, 2.0, dropout=0.1), "bias": full(1)}
    own = {"w": maker(2, 2, 0.5), "bias": full(2)}
    switched = compose.switch(own, like)
    assert jax.tree.structure(switched) == jax.tree.structure(like)
    fn(like, params, x)
    got = fn(switched, params, x)
    assert len(traces) == 1
    merged = lorax.merge(own, params)
    make.close(got, np.asarray(x @ merged["w"] + merged["bias"]))
    again = compose.switch(switched, like)
    jax.tree.map(np.testing.assert_array_equal, again, switched)


def test_switch_takes_dtype_and_sharding_from_like():
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    like = jax.tree.map(lambda v: v.astype(jnp.bfloat16), {"w": make.lora(1, 4)})
    like = jax.device_put(like, spec)
    got = compose.switch({"w": make.lora(2, 1)}, like)
    same = jax.tree.map(
        lambda g, v: (g.dtype, g.sharding) == (v.dtype, spec), got, like
    )
    assert all(jax.tree.leaves(same))
    abstract = jax.eval_shape(lambda: {"w": make.lora(1, 4)})
    assert compose.switch({"w": make.lora(2, 1)}, abstract)["w"].rank == 4


@pytest.mark.parametrize(
    "own,message",
    [
        ({"v": make.lora(1)}, r"differ in the paths \['v', 'w'\]"),
        ({"w": make.lora(1, 3)}, r"w: the adapter has rank 3 and like 2; .*resize"),
        ({"w": make.lora(1, out=(4,))}, r"w: .*out \(4,\).*out \(5,\)"),
        ({"w": make.adalora(1)}, r"w: the adapter has AdaLora.*to_lora"),
    ],
)
def test_switch_refuses_what_does_not_fit(own, message):
    with pytest.raises(ValueError, match=message):
        compose.switch(own, {"w": make.lora(9)})


def test_switch_refuses_a_scale_of_zero():
    with pytest.raises(ValueError, match="w: like has scale 0"):
        compose.switch({"w": make.lora(1)}, {"w": make.lora(2, scale=0.0)})
