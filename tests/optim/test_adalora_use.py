"""AdaLoRA among other transformations, over populations, and shrunk at the end."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax
from lorax import optim
from lorax.adapters import orthogonal_penalty
from tests import programs
from tests.optim.adalora_cases import (
    AXES,
    RATE,
    SHORT,
    STACK,
    applied,
    assert_trees_close,
    compiled,
    drawn,
    random_grads,
    two,
)

# Composition


def test_other_adapters_go_through_inner_unchanged():
    adapters = {
        **two(),
        "lora": lorax.Lora(programs.normal(7, 5, 2), jnp.ones((2, 3)), 2.0, AXES),
        "head": lorax.Full(programs.normal(8, 3)),
    }
    inner = optax.adam(1e-2)
    grads = [random_grads(adapters, i) for i in range(6)]
    got, state = applied(optim.adalora(inner, **SHORT), adapters, grads)[-1]
    want, _ = applied(inner, adapters, grads)[-1]
    for path in ("lora", "head"):
        assert_trees_close(got[path], want[path])
    assert set(state.mask) == {"m", "s"} == set(state.sensitivity)


def test_inside_multi_steps_one_count_is_one_update():
    adapters = two()
    tx = optim.adalora(optax.adam(1e-2), **SHORT)
    grads = [random_grads(adapters, i) for i in range(8)]
    want = applied(tx, adapters, grads)
    twice = [g for slope in grads for g in (slope, slope)]
    got = applied(optax.MultiSteps(tx, 2).gradient_transformation(), adapters, twice)
    for (a, state), (b, plain) in zip(got[1::2], want):
        assert_trees_close(a, b, atol=1e-7)
        ranks = optim.adalora_effective_ranks(state)
        assert_trees_close(ranks, optim.adalora_effective_ranks(plain))


def test_injected_hyperparameters_inside_and_out():
    adapters = two()
    grads = [random_grads(adapters, i) for i in range(4)]
    schedule = optax.linear_schedule(1e-2, 0.0, 8)
    # decays that are exact in float32: injected, 1 - 0.999 has a relative error of 1e-5
    adam = functools.partial(optax.adam, b1=0.5, b2=0.75)
    plain = optim.adalora(adam(schedule), **SHORT)
    injected = optim.adalora(
        optax.inject_hyperparams(adam)(learning_rate=schedule), **SHORT
    )
    want = applied(plain, adapters, grads)[-1][0]
    got, state = applied(injected, adapters, grads)[-1]
    assert_trees_close(got, want, atol=1e-7)
    assert float(state.inner.hyperparams["learning_rate"]) == pytest.approx(
        1e-2 * 5 / 8
    )
    static = (
        "target_budget",
        "total_steps",
        "initial_warmup",
        "final_steps",
        "interval",
    )
    outer = optax.inject_hyperparams(optim.adalora, static_args=static)(
        adam(schedule), **SHORT, orthogonal_weight=lambda count: 0.3
    )
    got, _ = applied(outer, adapters, grads)[-1]
    assert_trees_close(got, want, atol=1e-7)
    with pytest.raises(ValueError, match="name it in static_args"):
        optax.inject_hyperparams(optim.adalora)(optax.adam(0.1), **SHORT).init(adapters)


def outside_branches(jaxpr):
    """Names of primitives outside every cond branch, and of those inside."""
    always, within = set(), set()
    for eqn in jaxpr.eqns:
        always.add(eqn.primitive.name)
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    a, w = outside_branches(inner)
                    within |= w
                    if eqn.primitive.name == "cond":
                        within |= a
                    else:
                        always |= a
    return always, within


POPULATION = optim.AdaLoraState(None, None, 0, 0, 0, 0)


def test_a_population_is_its_members_and_sorts_only_when_it_chooses():
    tx = optim.adalora(optax.adam(1e-2), **SHORT)
    members = [jax.tree.map(lambda x: (1 + 0.2 * i) * x, two()) for i in range(3)]
    stack = lambda trees: jax.tree.map(lambda *xs: jnp.stack(xs), *trees)
    grads = [
        [random_grads(m, 10 * i + 4 * j) for j, m in enumerate(members)]
        for i in range(6)
    ]
    adapters = stack(members)
    state = jax.vmap(tx.init, out_axes=POPULATION)(adapters)
    update = jax.vmap(tx.update, (0, POPULATION, 0), (0, POPULATION))
    always, within = outside_branches(
        jax.make_jaxpr(update)(adapters, state, adapters).jaxpr
    )
    assert "sort" in within and "sort" not in always
    batched = jax.tree.map(lambda x: jnp.stack([x] * 3), tx.init(members[0]))
    naive = jax.make_jaxpr(jax.vmap(tx.update))(adapters, batched, adapters)
    assert "sort" in outside_branches(naive.jaxpr)[0]

    run = compiled(update, adapters, state, adapters)
    single = compiled(tx.update, members[0], tx.init(members[0]), members[0])
    for row in grads:
        updates, state = run(stack(row), state, adapters)
        adapters = optax.apply_updates(adapters, updates)
    assert state.count.shape == state.budget.shape == ()
    ranks = optim.adalora_effective_ranks(state)
    assert ranks["m"].shape == (3,) and ranks["s"].shape == (3, 2)
    found = []
    for j, member in enumerate(members):
        own, alone = member, tx.init(member)
        for row in grads:
            updates, alone = single(row[j], alone, own)
            own = optax.apply_updates(own, updates)
        assert_trees_close(jax.tree.map(lambda x: x[j], adapters), own, atol=1e-6)
        for path, mask in alone.mask.items():
            np.testing.assert_array_equal(state.mask[path][j], mask)
        found.append([m.tolist() for m in jax.tree.leaves(alone.mask)])
    assert found[0] != found[1]  # members choose for themselves
    small = optim.adalora_shrink(adapters, state)
    for path, adapter in small.items():
        delta = lambda a: np.einsum("...ir,...r,...ro->...io", a.p, a.lam, a.q)
        np.testing.assert_allclose(delta(adapter), delta(adapters[path]), atol=1e-6)
        assert adapter.rank == int(ranks[path].max())


# Shrinking


def trained(adapters, target_budget, steps=8):
    run = {**SHORT, "target_budget": target_budget}
    tx = optim.adalora(optax.sgd(RATE), **run, orthogonal_weight=0.0)
    return applied(tx, adapters, [random_grads(adapters, 0)] * steps)


def test_shrunk_adapters_are_the_same_function():
    conv = lorax.Axes((0, 1), (2,))
    adapters = {
        "m": drawn(0),
        "s": drawn(3, 2, n=5, m=5, rank=3, axes=STACK),
        "c": lorax.AdaLora(
            0.01 * programs.normal(5, 3, 4, 2),
            0.01 * programs.normal(6, 2),
            0.01 * programs.normal(7, 2, 4),
            1.0,
            conv,
        ),
    }
    params = {
        "m": programs.normal(10, 5, 4),
        "s": programs.normal(11, 2, 5, 5),
        "c": programs.normal(12, 3, 4, 4),
    }

    def fn(params, x):
        x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["s"])[0]
        x = jnp.tanh(x @ params["m"])[None]
        return jax.lax.conv_general_dilated(
            x, params["c"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        )

    adapters, state = trained(adapters, target_budget=4)[-1]
    ranks = optim.adalora_effective_ranks(state)
    small = optim.adalora_shrink(adapters, state)
    for path, adapter in small.items():
        assert adapter.rank == int(ranks[path].max()) > 0
        assert adapter.axes == adapters[path].axes
        assert adapter.scale == adapters[path].scale
    dropped = {path for path, r in ranks.items() if not r.any()}
    assert set(small) == set(adapters) - dropped
    assert dropped  # a leaf can end at rank 0, and this one does
    sizes = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert sizes(small) < sizes(adapters)
    x = programs.normal(20, 6, 5)
    adapted = lorax.adapt(fn, on_merge="error")

    def values(adapters):
        merged = fn(lorax.merge(adapters, params), x)
        loss = lambda adapters: jnp.sum(adapted(adapters, params, x) ** 2)
        slopes = jax.grad(lambda a: loss(a) + orthogonal_penalty(a))(adapters)
        return merged, adapted(adapters, params, x), slopes

    before = compiled(values, adapters)(adapters)
    after = compiled(values, small)(small)
    np.testing.assert_allclose(after[0], before[0], atol=1e-6)
    np.testing.assert_allclose(after[1], before[1], atol=1e-6)
    # padding is dead: its gradients are zero
    grads = after[2]["s"]
    for layer, rank in enumerate(ranks["s"].tolist()):
        for part in (
            grads.p[layer, :, rank:],
            grads.q[layer, rank:],
            grads.lam[layer, rank:],
        ):
            np.testing.assert_array_equal(part, 0)
    assert min(ranks["s"].tolist()) < max(ranks["s"].tolist())


def test_shrinking_between_two_choices_would_change_the_function():
    adapters, state = trained(two(), 3, steps=3)[-1]
    with pytest.raises(ValueError, match="trained since the last choice"):
        optim.adalora_shrink(adapters, state)


def test_a_plain_optimiser_revives_pruned_triplets_and_not_shrunk_ones():
    adapters, state = trained(two(), 3)[-1]
    small = optim.adalora_shrink(adapters)  # lam = 0 alone marks what is pruned
    by_mask = optim.adalora_shrink(adapters, state)
    assert small.keys() == by_mask.keys()
    assert_trees_close(small, by_mask)
    count = lambda tree: sum(int(jnp.sum(a.lam != 0)) for a in tree.values())
    assert count(adapters) == count(small) == 3
    params = {"m": programs.normal(10, 5, 4), "s": programs.normal(11, 2, 4, 3)}
    loss = lambda a: sum(jnp.sum(w**2) for w in lorax.merge(a, params).values())
    step = lambda a: jax.tree.map(lambda x, g: x - 1e-3 * g, a, jax.grad(loss)(a))
    assert count(step(adapters)) == 7 and count(step(small)) == 3
    with pytest.raises(ValueError, match="no AdaLora adapter among Full"):
        optim.adalora_shrink({"v": lorax.Full(jnp.ones(2))})


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"initial_warmup": 5}, "leave none of total_steps=8"),
        ({"target_budget": 0}, "target_budget=0; give a Python int of at least 1"),
        ({"target_budget": 2.0}, "target_budget=2.0; give a Python int"),
        ({"total_steps": jnp.int32(8)}, "total_steps=.*give a Python int"),
        ({"interval": 0}, "interval=0; give a Python int of at least 1"),
        ({"final_steps": -1}, "final_steps=-1; give a Python int of at least 0"),
        ({"init_budget": 2}, "target_budget=3 is above the initial budget 2"),
        ({"beta1": 1.0}, "beta1=1.0; give a decay rate between 0 and 1"),
        ({"beta2": 0.0}, "beta2=0.0; give a decay rate between 0 and 1"),
        ({"orthogonal_weight": -1.0}, "orthogonal_weight=-1.0; give a number of"),
        ({"orthogonal_form": "frobenius"}, "choose 'decoupled' .*, 'squared' .* or 'n"),
        ({"importance": "mid"}, "importance='mid'; choose 'post'"),
    ],
)
def test_what_cannot_run_is_refused_at_construction(change, message):
    with pytest.raises(ValueError, match=message):
        optim.adalora(optax.sgd(0.1), **{**SHORT, **change})


def test_what_the_adapters_rule_out_is_refused_at_init():
    sgd = optax.sgd(0.1)
    adapters = two()
    with pytest.raises(ValueError, match="init_budget=8, but the ranks .* sum to 7"):
        optim.adalora(sgd, **SHORT, init_budget=8).init(adapters)
    with pytest.raises(
        ValueError, match="target_budget=8 is above the initial budget 7"
    ):
        optim.adalora(sgd, **{**SHORT, "target_budget": 8}).init(adapters)
    tx = optim.adalora(sgd, **SHORT)
    lora = {"w": lorax.Lora(jnp.ones((2, 1)), jnp.ones((1, 2)), 1.0, AXES)}
    with pytest.raises(ValueError, match="no AdaLora adapter among Lora"):
        tx.init(lora)
    with pytest.raises(ValueError, match="call tx.update"):
        tx.update(adapters, tx.init(adapters))
    with pytest.raises(TypeError, match="inner must be an optax transformation"):
        optim.adalora(0.1, **SHORT)
    with pytest.raises(TypeError, match="MultiSteps goes outside"):
        optim.adalora(optax.MultiSteps(sgd, 2), **SHORT)


def test_the_readers_need_one_state():
    with pytest.raises(ValueError, match="holds 0"):
        optim.adalora_budget(optax.sgd(0.1).init({}))
    state = optim.adalora(optax.sgd(0.1), **SHORT).init(two())
    assert int(optim.adalora_budget((state, optax.EmptyState()))) == 7
    assert math.prod(optim.adalora_effective_ranks([state])["s"].shape) == 2
    with pytest.raises(ValueError, match="holds 2"):
        optim.adalora_effective_ranks((state, state))
