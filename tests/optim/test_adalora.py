"""AdaLoRA's schedule, importance and masks, step by step.

The references are a float64 simulation in numpy, written from the equations, and
arguments about which triplets can come back.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax
from lorax import optim
from tests import programs
from tests.optim.adalora_cases import (
    AXES,
    RATE,
    RUN,
    SHORT,
    STACK,
    applied,
    assert_trees_close,
    compiled,
    drawn,
    pull,
    random_grads,
    released_budget,
    two,
)

# The schedule


def test_the_published_schedule():
    schedule = optim.BudgetSchedule(96, 3000, 500, 1500, 10)
    got = [schedule.budget(144, t) for t in range(3101)]
    assert got[500] == 144 and got[1500] == 96 and got[3000] == got[3100] == 96
    assert got[1000] == 96 + 48 // 8
    assert all(b <= a for a, b in zip(got, got[1:]))
    assert got == [released_budget(t) for t in range(3101)]
    traced = jax.vmap(lambda t: schedule.budget_at(144, t))(jnp.arange(3101))
    assert traced.tolist() == got


def test_the_budget_is_exact_where_floats_truncate_too_low():
    # 1000 (1 - t/10)^3 is an integer at every step; the released float formula says 511
    # instead of 512, ...
    schedule = optim.BudgetSchedule(1, 20, 0, 10, 1)
    exact = [1 + (10 - t) ** 3 for t in range(11)]
    assert [schedule.budget(1001, t) for t in range(11)] == exact
    floats = [released_budget(t, 1001, 1, 0, 10, 20) for t in range(11)]
    assert floats != exact and all(f - e in (0, -1) for f, e in zip(floats, exact))
    traced = [int(schedule.budget_at(1001, jnp.int32(t))) for t in range(11)]
    assert traced == exact


def test_choices_fall_on_the_interval_and_on_the_last_step():
    schedule = optim.BudgetSchedule(4, 50, 12, 13, 6)
    steps = jnp.arange(60)
    assert steps[schedule.chooses_at(steps)].tolist() == [18, 24, 30, 36, 37]
    assert optim.BudgetSchedule(4, 3000, 500, 1500).interval == 15
    assert optim.BudgetSchedule(4, 100, 0, 0).interval == 10


# Importance and masks


def task_gradient(matrix, goal):
    """Gradients of |scale p diag(lam) q - goal|^2 / 2 for one matrix."""
    p, lam, q, scale = matrix
    away = scale * (scale * (p * lam) @ q - goal)
    dp, dq = away @ q.T * lam, lam[:, None] * (p.T @ away)
    return dp, np.einsum("ik,ij,kj->k", p, away, q), dq


def simulated(matrices, goals, order, form, gamma, steps, interval=10):
    """Every step's task gradients, matrices, (Ibar, Ubar) and masks, in float64."""
    beta, count = (0.85, 0.85), len(matrices)
    total = sum(lam.size for _, lam, _, _ in matrices)
    zeros = lambda: [[np.zeros_like(x) for x in matrix[:3]] for matrix in matrices]
    ibar, ubar, masks = zeros(), zeros(), [np.ones(len(m[1]), bool) for m in matrices]
    bT, T, ti, tf = (RUN[k] for k in RUN)
    for t in range(1, steps + 1):
        task = [task_gradient(m, goal) for m, goal in zip(matrices, goals)]
        new, scores = [], []
        for k, ((p, lam, q, scale), (dp, dlam, dq)) in enumerate(zip(matrices, task)):
            more = (
                pull(p, form, gamma, count, RATE * dp),
                0,
                pull(q.T, form, gamma, count, RATE * dq.T).T,
            )
            old, grad = (p, lam, q), (dp, dlam, dq)
            if form == "decoupled":  # importance sees only the task
                after = [w - RATE * d - m for w, d, m in zip(old, grad, more)]
            else:
                grad = [d + m for d, m in zip(grad, more)]
                after = [w - RATE * d for w, d in zip(old, grad)]
            if t <= T - tf:
                for i, w in enumerate(after if order == "post" else old):
                    now = np.abs(w * grad[i])
                    ibar[k][i] = beta[0] * ibar[k][i] + (1 - beta[0]) * now
                    away = np.abs(now - ibar[k][i])
                    ubar[k][i] = beta[1] * ubar[k][i] + (1 - beta[1]) * away
            s = [a * b for a, b in zip(ibar[k], ubar[k])]
            scores.append(s[1] + s[0].mean(0) + s[2].mean(1))
            new.append((*after, scale))
        if ti < t <= T - tf and t % interval == 0:
            budget = int(bT + (total - bT) * (1 - (t - ti) / (T - ti - tf)) ** 3)
            kept = np.sort(np.concatenate(scores))[::-1][:budget]
            masks = [score >= kept[-1] for score in scores]
        if t > T - tf or (ti < t and t % interval == 0):
            new = [(p, lam * m, q, s) for (p, lam, q, s), m in zip(new, masks)]
        matrices = new
        yield task, matrices, ibar, ubar, masks


def as_matrices(adapters):
    """The three matrices of `two()`, in float64."""
    wide = lambda x: np.asarray(x, np.float64)
    m, s = adapters["m"], adapters["s"]
    layers = [(wide(s.p[i]), wide(s.lam[i]), wide(s.q[i]), s.scale) for i in (0, 1)]
    return [(wide(m.p), wide(m.lam), wide(m.q), m.scale), *layers]


def as_adapters(parts, like):
    """Three tuples (p, lam, q) as the tree of `two()`, float32 or bool."""
    m, *layers = parts
    fields = lambda *xs: dict(zip(("p", "lam", "q"), xs))
    stacked = [jnp.asarray(np.stack(x), jnp.float32) for x in zip(*layers)]
    return {
        "m": dataclasses.replace(
            like["m"], **fields(*(jnp.asarray(x, jnp.float32) for x in m))
        ),
        "s": dataclasses.replace(like["s"], **fields(*stacked)),
    }


@pytest.mark.parametrize(
    ("order", "form", "gamma"),
    [
        ("post", "decoupled", 0.3),
        ("pre", "squared", 0.06),
        ("post", "norm", 0.3),
    ],
)
def test_two_hundred_steps_against_the_equations(order, form, gamma):
    adapters = two()
    goals = [programs.normal(9 + i, *s) for i, s in enumerate([(5, 4), (4, 3), (4, 3)])]
    goals = [np.asarray(goal, np.float64) for goal in goals]
    tx = optim.adalora(
        optax.sgd(RATE),
        **RUN,
        orthogonal_form=form,
        orthogonal_weight=gamma,
        importance=order,
    )
    state, ranks = tx.init(adapters), []
    update = compiled(tx.update, adapters, state, adapters)
    simulation = simulated(as_matrices(adapters), goals, order, form, gamma, 200)
    for t, (task, matrices, ibar, ubar, masks) in enumerate(simulation, 1):
        grads = as_adapters(task, adapters)
        updates, state = update(grads, state, adapters)
        adapters = optax.apply_updates(adapters, updates)
        got = [np.asarray(state.mask["m"]), *np.asarray(state.mask["s"])]
        assert [m.tolist() for m in got] == [m.tolist() for m in masks], t
        want = as_adapters([m[:3] for m in matrices], adapters)
        assert_trees_close(adapters, want, rtol=2e-4, atol=2e-5)
        for moments, sim in ((state.sensitivity, ibar), (state.uncertainty, ubar)):
            assert_trees_close(
                moments, as_adapters(sim, adapters), rtol=2e-3, atol=1e-6
            )
        ranks.append(int(sum(m.sum() for m in masks)))
        assert int(optim.adalora_budget(state)) == released_budget(t, 7, 4, 20, 60, 200)
    assert ranks[19] == 7 and ranks[139] == 4 and {4, 5, 6, 7} == set(ranks)
    effective = optim.adalora_effective_ranks(state)
    assert effective["m"].shape == () and effective["s"].shape == (2,)
    assert sum(int(r.sum()) for r in effective.values()) == 4
    # the last choice holds at every step: lam is zero where masked, and only there
    for path in adapters:
        np.testing.assert_array_equal(adapters[path].lam != 0, state.mask[path])


def forced_out(order, interval):
    """Trains two triplets at budget 1, the important one pruned at step 10.

    Returns the masks at steps 11 to 60.
    """
    goal = jnp.diag(jnp.array([3.0, 0.3]))
    adapter = lorax.AdaLora(jnp.eye(2), jnp.array([0.0, 0.2]), jnp.eye(2), 1.0, AXES)
    tx = optim.adalora(
        optax.sgd(RATE),
        target_budget=1,
        total_steps=200,
        initial_warmup=0,
        final_steps=1,
        interval=interval,
        orthogonal_weight=0.0,
        importance=order,
    )
    adapters = {"w": adapter}
    # a little noise in the target, as from batches: a fixed point has no gradient
    loss = lambda adapters, goal: (
        0.5 * jnp.sum((adapters["w"].delta(jnp.zeros((2, 2))) - goal) ** 2)
    )

    @jax.jit
    def step(carry, noise):
        adapters, state = carry
        grads = jax.grad(loss)(adapters, goal + noise)
        updates, state = tx.update(grads, state, adapters)
        return (optax.apply_updates(adapters, updates), state), state.mask["w"]

    state = tx.init(adapters)
    felt = dataclasses.replace(
        jax.tree.map(jnp.zeros_like, adapter), lam=jnp.array([0.0, 0.1])
    )
    state = optim.AdaLoraState(
        jnp.int32(10),
        jnp.int32(1),
        {"w": felt},
        {"w": felt},
        {"w": jnp.array([False, True])},
        state.inner,
    )
    noise = 0.1 * programs.normal(0, 50, 2, 2)
    return np.asarray(jax.lax.scan(step, (adapters, state), noise)[1])


@pytest.mark.parametrize("order", ["post", "pre"])
def test_a_pruned_triplet_comes_back_where_the_interval_lets_it(order):
    masks = forced_out(order, interval=10)
    assert masks[8].tolist() == [False, True]  # step 19: no new choice yet
    # it comes back at the first or second opportunity, and stays
    assert masks[19].tolist() == [True, False] and masks[-1].tolist() == [True, False]


def test_before_the_update_a_pruned_triplet_never_comes_back_at_interval_one():
    # lam = 0 at every step, so I(lam) = 0 and p and q have no gradient
    assert not forced_out("pre", interval=1)[:, 0].any()


def test_ties_keep_exactly_the_budget():
    adapter = lorax.AdaLora(jnp.ones((3, 4)), jnp.ones(4), jnp.ones((4, 2)), 1.0, AXES)
    adapters = {"b": adapter, "a": adapter}
    tx = optim.adalora(
        optax.sgd(0.1),
        target_budget=3,
        total_steps=4,
        initial_warmup=0,
        final_steps=2,
        interval=1,
        orthogonal_weight=0.0,
    )
    for grads in (adapters, jax.tree.map(jnp.zeros_like, adapters)):
        history = applied(tx, adapters, [grads] * 2)
        ranks = optim.adalora_effective_ranks(history[-1][1])
        assert {path: int(r) for path, r in ranks.items()} == {"a": 3, "b": 0}


@pytest.mark.filterwarnings("error")
def test_a_budget_of_all_triplets_prunes_nothing():
    tx = optim.adalora(
        optax.sgd(RATE),
        init_budget=7,
        target_budget=7,
        total_steps=4,
        initial_warmup=0,
        final_steps=1,
        interval=1,
        orthogonal_weight=0.0,
    )
    adapters = two()
    history = applied(tx, adapters, [random_grads(adapters, i) for i in range(4)])
    for i, (got, state) in enumerate(history):
        assert all(mask.all() for mask in state.mask.values())
        adapters = jax.tree.map(
            lambda p, g: p - RATE * g, adapters, random_grads(adapters, i)
        )
        assert_trees_close(got, adapters)


def test_lam_trains_on_between_two_choices_and_not_after_the_last():
    tx = optim.adalora(optax.sgd(RATE), **SHORT)
    adapters = two()
    history = applied(tx, adapters, [random_grads(adapters, i) for i in range(10)])
    pruned = []
    for adapters, state in history:
        lam = np.concatenate([np.ravel(adapters[p].lam) for p in ("m", "s")])
        kept = np.concatenate([np.ravel(state.mask[p]) for p in ("m", "s")])
        pruned.append(lam[~kept])
    assert pruned[0].size == 0
    for t, lam in enumerate(pruned[1:], 2):
        assert lam.size == 7 - 3 if t >= 5 else lam.size > 0
        assert (lam != 0).all() if t == 3 else not lam.any(), t
    frozen = [state.sensitivity for _, state in history[4:]]
    for later in frozen[1:]:
        jax.tree.map(np.testing.assert_array_equal, later, frozen[0])
    # p and q of pruned triplets keep training
    before, after = history[-2][0]["m"], history[-1][0]["m"]
    assert (before.p != after.p).any(0).all() and (before.q != after.q).any(1).all()


def test_a_stack_is_as_many_matrices_and_axes_do_not_matter():
    stacked = drawn(3, 2, n=6, m=4, rank=2, axes=STACK)
    apart = {str(i): drawn(3, n=6, m=4, rank=2) for i in (0, 1)}
    for i, own in apart.items():
        apart[i] = dataclasses.replace(
            own, p=stacked.p[int(i)], lam=stacked.lam[int(i)], q=stacked.q[int(i)]
        )
    wide = dataclasses.replace(
        stacked,
        p=stacked.p.reshape(2, 3, 2, 2),
        q=stacked.q.reshape(2, 2, 2, 2),
        axes=lorax.Axes((1, 2), (3, 4), (0,)),
    )
    run = {**SHORT, "target_budget": 2}
    tx = optim.adalora(optax.sgd(RATE), **run)
    grads = random_grads({"w": stacked}, 0)["w"]
    split = {
        str(i): dataclasses.replace(
            apart[str(i)], p=grads.p[i], lam=grads.lam[i], q=grads.q[i]
        )
        for i in (0, 1)
    }
    folded = dataclasses.replace(
        wide,
        p=grads.p.reshape(wide.p.shape),
        lam=grads.lam,
        q=grads.q.reshape(wide.q.shape),
    )
    masks = [
        applied(tx, adapters, [slope] * 6)[-1][1].mask
        for adapters, slope in (
            ({"w": stacked}, {"w": grads}),
            (apart, split),
            ({"w": wide}, {"w": folded}),
        )
    ]
    whole = np.asarray(masks[0]["w"])
    assert whole.sum() == 2
    np.testing.assert_array_equal(whole, np.stack([masks[1]["0"], masks[1]["1"]]))
    np.testing.assert_array_equal(whole, masks[2]["w"])
