"""Populations: shared counts, members that diverge, donation, bad input."""

from __future__ import annotations

import dataclasses
import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorax import population as pop
from lorax.adapters import Lora
from lorax.checkpoint import RunCheckpoints
from lorax.types import Axes
from tests.test_population import (
    DENSE,
    LOSS,
    assert_same,
    keys_of,
    member_of,
    problem,
    train,
    train_alone,
)

# Counts


def cond_on_count(every=2):
    """Halves the updates at every second count, in a `lax.cond`."""

    def update(updates, state, params=None, **extra):
        del params, extra
        half = lambda u: jax.tree.map(lambda x: x / 2, u)
        updates = jax.lax.cond(state["n"] % every == 0, half, lambda u: u, updates)
        return updates, {"n": state["n"] + 1}

    init = lambda params: {"n": jnp.zeros((), jnp.int32)}
    return optax.GradientTransformationExtraArgs(init, update)


def integers(population):
    leaves = jax.tree.leaves(population.state.opt_state)
    return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.integer)]


def test_a_cond_on_a_count_stays_a_cond():
    params, _, batch = problem()
    members = [member_of(0, 1), member_of(1, 2)]
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    tx = optax.chain(optax.scale_by_adam(), cond_on_count(), optax.sgd(schedule))
    population = pop.create_population(keys_of(2), members, tx, params)
    assert [count.shape for count in integers(population)] == [(), (), ()]
    assert population.state.step.shape == ()
    step = pop.make_population_step(LOSS, tx)
    assert " cond[" in str(jax.make_jaxpr(step)(population, params, batch))
    population, _ = train(LOSS, tx, members, steps=3)
    assert [int(count) for count in integers(population)] == [3, 3, 3]
    alone, _ = train_alone(LOSS, tx, members, 1, steps=3)
    assert_same(pop.member(population, 1), alone.adapters)


def test_counts_that_depend_on_the_gradients_are_each_members_own():
    params = problem()[0]
    members, tx = [member_of(0), member_of(1)], optax.apply_if_finite(optax.adam(1), 3)
    population = pop.create_population(keys_of(2), members, tx, params)
    assert {count.shape for count in integers(population)} == {(2,)}
    assert population.pairs == {}  # because the members' scales and ranks are the same


def test_inside_multi_steps():
    members = [member_of(0, 1), member_of(1, 2)]
    make = lambda rate: optax.MultiSteps(
        optax.inject_hyperparams(optax.adam)(learning_rate=rate), 2
    )
    rates = {"learning_rate": (0.1, 0.01)}
    population, _ = train(LOSS, make(1.0), members, steps=4, hyperparams=rates)
    assert {count.shape for count in integers(population)} == {()}
    for k in range(2):
        own = make(rates["learning_rate"][k])
        alone, _ = train_alone(LOSS, own, members, k, steps=4)
        assert_same(pop.member(population, k), alone.adapters)


@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_members_in_groups_are_the_members_at_once(at_once):
    members = [member_of(0, 1), member_of(1, 3), member_of(2, 2)]
    tx = optax.chain(optax.scale_by_adam(), cond_on_count(), optax.sgd(0.05))
    want, history = train(LOSS, tx, members, steps=3)
    got, grouped = train(LOSS, tx, members, steps=3, at_once=at_once)
    assert_same(got.state.adapters, want.state.adapters)
    assert_same(grouped, history)
    assert [int(count) for count in integers(got)] == [3, 3]
    params, _, batch = problem()
    step = pop.make_population_step(LOSS, tx, at_once=at_once)
    assert " cond[" in str(jax.make_jaxpr(step)(got, params, batch))
    evaluate = pop.make_population_eval_step(LOSS, at_once=at_once)
    loss = evaluate(got, params, batch)["loss"]
    assert loss.shape == (3,) and jnp.all(loss < history[0]["loss"])


def test_a_member_that_diverges_leaves_the_others_alone():
    members = [member_of(0), member_of(1)]
    broken = members[0]["head"].replace(b=jnp.full((2, 3), jnp.inf))
    members = [{**members[0], "head": broken}, members[1]]
    population, history = train(LOSS, optax.adam(0.1), members, steps=3)
    assert history[-1]["skipped"].tolist() == [3, 0]
    assert_same(pop.member(population, 0)["layers"], members[0]["layers"], 0.0)
    alone, _ = train_alone(LOSS, optax.adam(0.1), members, 1, steps=3)
    assert_same(pop.member(population, 1), alone.adapters)
    assert [int(count) for count in integers(population)] == [3]
    # If every member skips, no count advances.
    population, _ = train(LOSS, optax.adam(0.1), [members[0]] * 2, steps=3)
    assert [int(count) for count in integers(population)] == [0]
    assert population.state.step == 3


def test_a_member_whose_updates_are_not_finite_leaves_the_others_alone():
    members = [member_of(0, 1), member_of(1, 2)]
    make = lambda rate: optax.inject_hyperparams(optax.adam)(learning_rate=rate)
    rates = {"learning_rate": (jnp.inf, 0.1)}
    population, history = train(LOSS, make(1.0), members, steps=3, hyperparams=rates)
    assert history[-1]["skipped"].tolist() == [3, 0]
    assert jnp.isfinite(history[-1]["loss"]).all()
    assert_same(pop.member(population, 0), members[0], 0.0)
    alone, _ = train_alone(LOSS, make(0.1), members, 1, steps=3)
    assert_same(pop.member(population, 1), alone.adapters)


# Donation


def test_donated_steps_spare_what_the_caller_holds():
    params, _, batch = problem()
    members, keys = [member_of(0, 1), member_of(1, 2)], jnp.stack(keys_of(2))
    rates = jnp.array([0.1, 0.2])
    tx = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)
    before = pop.create_population(
        keys, members, tx, params, hyperparams={"learning_rate": rates}
    )
    step = jax.jit(pop.make_population_step(LOSS, tx), donate_argnums=0)
    kind = jax.tree.map(lambda x: (x.shape, x.dtype), before)
    after, _ = step(before, params, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == kind
    assert before.state.adapters["head"].a.is_deleted()
    held = jax.tree.leaves((keys, rates, members, params))
    assert not any(leaf.is_deleted() for leaf in held)


# The roster


def uneven():
    """Members of two ranks, one with a scale that float32 cannot represent."""
    return [member_of(0, 1, 1.0), member_of(1, 3, 8.0)]


def created(members):
    return pop.create_population(keys_of(2), members, optax.adam(0.1), problem()[0])


def test_the_roster_is_static_and_exact():
    population = created(uneven())
    assert population.roster.of(1)["head"] == (8 / 3, 3)
    assert pop.member(population, 1)["head"].scale == 8 / 3
    assert pop.member(population, 0)["head"].rank == 1
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(population.pairs)}
    assert dtypes == {jnp.dtype("float32"), jnp.dtype("int32")}


def test_a_program_serves_every_population_of_one_roster():
    params, _, batch = problem()
    traces, step = [], pop.make_population_step(LOSS, optax.adam(0.1))

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def counted(population):
        traces.append(1)
        return step(population, params, batch)

    again = [member_of(5, 1, 1.0), member_of(6, 3, 8.0)]
    for members in (uneven(), again):
        population, _ = counted(created(members))
        population, _ = counted(population)
        assert population.roster.of(1)["head"].scale == 8 / 3
    assert len(traces) == 1


def test_the_state_of_a_population_is_saved_like_a_runs(tmp_path):
    fresh = created(uneven())
    moved = jax.tree.map(lambda x: np.asarray(x) + 1, fresh.state.adapters)
    trained = dataclasses.replace(fresh, state=fresh.state.replace(adapters=moved))
    with RunCheckpoints(tmp_path / "run", problem()[0]) as run:
        run.save(trained.state)
        restored = run.restore(fresh.state)
    read = dataclasses.replace(fresh, state=restored.state)
    assert pop.member(read, 1)["head"].scale == 8 / 3
    for k in range(2):
        assert_same(pop.member(read, k), pop.member(trained, k), 0.0)


def test_a_population_is_read_from_dicts_of_today_and_of_before():
    population = created(uneven())
    today = flax.serialization.to_state_dict(population)
    bits = {  # scales 1 and 8 / 3 in float64, the low half of the bits first
        "head": np.array([[0, 0x3FF00000], [0x55555555, 0x40055555]], np.uint32),
        "layers": np.array([[0, 0x3FF00000], [0x55555555, 0x40055555]], np.uint32),
    }
    before = {name: today[name] for name in ("state", "pairs")}
    for saved in (today, {**before, "scale_bits": bits}):
        other = created([member_of(7, 1, 5.0), member_of(8, 3, 5.0)])
        read = flax.serialization.from_state_dict(other, saved)
        assert read.roster == population.roster
        assert_same(pop.member(read, 1), pop.member(population, 1), 0.0)
    with pytest.raises(ValueError, match=r"\['pairs', 'state'\], but neither 'roster'"):
        flax.serialization.from_state_dict(other, before)


# Bad input


def changed(path="head", **fields):
    adapters = member_of(1)
    return {**adapters, path: dataclasses.replace(adapters[path], **fields)}


@pytest.mark.parametrize(
    ("second", "told"),
    [
        (
            lambda: changed(dropout=0.5),
            r"head: member 1 has dropout=0.5.*member 0.*0.0",
        ),
        (lambda: changed("layers", layers=(0, 1)), r"layers: member 1 has layers=\(0"),
        (
            lambda: changed(a=jnp.zeros((6, 2), jnp.bfloat16)),
            "head: .*a.dtype=.*bfloat",
        ),
        (lambda: member_of(1, adapter="dora"), "head: member 1 has class=.*Dora"),
        (lambda: {"head": member_of(1)["head"]}, "bias: member 0 has an adapter there"),
    ],
)
def test_members_that_cannot_be_stacked_are_named(second, told):
    members = [member_of(0), second()]
    with pytest.raises(ValueError, match=told):
        pop.create_population(keys_of(2), members, optax.sgd(0.1), problem()[0])


def test_other_axes_and_unequal_adalora_are_named():
    square = {"w": jnp.zeros((3, 3))}
    turned = lambda axes: {"w": Lora(jnp.ones((3, 1)), jnp.zeros((1, 3)), 1.0, axes)}
    members = [turned(DENSE), turned(Axes((1,), (0,)))]
    with pytest.raises(ValueError, match=r"w: member 1 has axes=Axes\(in_=\(1,\)"):
        pop.create_population(keys_of(2), members, optax.sgd(0.1), square)
    members = [member_of(0, rank, adapter="adalora") for rank in (2, 3)]
    with pytest.raises(ValueError, match="member 1 has p.shape=.*except AdaLora"):
        pop.create_population(keys_of(2), members, optax.sgd(0.1), problem()[0])


def test_counts_of_members_keys_and_hyperparameters_are_checked():
    params, members = problem()[0], [member_of(0), member_of(1)]
    plain = optax.sgd(0.1)
    tx = optax.inject_hyperparams(optax.adam)(optax.linear_schedule(1, 0, 9), b1=0.9)
    create = functools.partial(pop.create_population, params=params)
    with pytest.raises(ValueError, match="members is empty"):
        create([], [], plain)
    with pytest.raises(ValueError, match=r"2 members need one key each.*\(3,\)"):
        create(keys_of(3), members, plain)
    with pytest.raises(TypeError, match="must be an optax transformation"):
        create(keys_of(2), members, 0.1)
    with pytest.raises(ValueError, match=r"'ratio'\]: tx has no such number.*b1, b2"):
        create(keys_of(2), members, tx, hyperparams={"ratio": (1, 2)})
    with pytest.raises(ValueError, match=r"'learning_rate'\]: tx.*not a schedule"):
        create(keys_of(2), members, tx, hyperparams={"learning_rate": (1, 2)})
    with pytest.raises(ValueError, match="it has none. Build tx with optax.inject"):
        create(keys_of(2), members, plain, hyperparams={"learning_rate": (1, 2)})
    with pytest.raises(ValueError, match=r"'b1'\] has shape \(3,\); give 2"):
        create(keys_of(2), members, tx, hyperparams={"b1": (0.1, 0.2, 0.3)})
    for count in (0, 2.0, True):
        with pytest.raises(ValueError, match="at_once must be an int of at least 1"):
            pop.make_population_step(LOSS, plain, at_once=count)
        with pytest.raises(ValueError, match="at_once must be an int of at least 1"):
            pop.make_population_eval_step(LOSS, at_once=count)
    with pytest.raises(IndexError, match="no member 2 in a population of 2"):
        pop.member(create(keys_of(2), members, plain), 2)
