"""LoRA+ by hand, its limits, the width rule, roles, and every error."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorax import optim
from lorax.adapters import Lora
from lorax.types import PairStatics
from tests.optim import problems

TREE = {
    "attn/q": problems.lora(),
    "dora": problems.dora(),
    "svd": problems.adalora(),
    "bias": problems.full(),
}


def ratios(tx, adapters=TREE, steps=1, **extra):
    """The factor on each leaf's update at the last of some steps."""
    state, grads = tx.init(adapters), problems.like(adapters)
    for _ in range(steps):
        updates, state = tx.update(grads, state, adapters, **extra)
    mean = lambda u, g: float(np.mean(np.asarray(u) / np.asarray(g)))
    tree = jax.tree.map(mean, updates, grads)
    return {
        f"{path}.{field}": getattr(a, field)
        for path, a in tree.items()
        for field in a.roles
    }


def test_by_hand():
    # SGD at rate 0.5 with ratio 3: a moves by -0.5 g, b by -1.5 g.
    lora = Lora(jnp.ones((2, 1)), jnp.ones((1, 1)), 2.0, problems.DENSE)
    tx = optax.chain(optim.scale_by_lora_plus(3.0), optax.scale_by_learning_rate(0.5))
    updates, _ = tx.update({"w": lora.replace(b=4 * lora.b)}, tx.init({"w": lora}))
    np.testing.assert_array_equal(updates["w"].a, [[-0.5], [-0.5]])
    np.testing.assert_array_equal(updates["w"].b, [[-6.0]])


def test_only_second_factors_get_the_ratio_whatever_their_number_of_axes():
    got = ratios(optim.scale_by_lora_plus(7.0))
    seconds = {"attn/q.b", "dora.b", "svd.q"}
    assert {name for name, ratio in got.items() if ratio == 7} == seconds
    assert all(got[name] == 1 for name in got.keys() - seconds)


def test_ratio_one_is_adamw_to_the_bit():
    decay = 0.1
    ours = optim.lora_plus(1e-2, 1.0, weight_decay=decay)
    optax_own = optax.adamw(1e-2, weight_decay=decay, mask=optim.decay_mask)
    results = []
    for tx in (ours, optax_own):
        adapters, state = TREE, tx.init(TREE)
        for step in range(3):
            grads = problems.like(adapters, step)
            updates, state = tx.update(grads, state, adapters)
            adapters = optax.apply_updates(adapters, updates)
        results.append(adapters)
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_adam_step_by_hand():
    # The first step of Adam is -lr sign(g); decay adds -lr wd w at the base rate.
    tx = optim.lora_plus(0.1, 16.0, eps=1e-12, weight_decay=0.5)
    grads = problems.like(TREE)
    updates, _ = tx.update(grads, tx.init(TREE), TREE)
    g, w, u = (np.asarray(t["dora"].b, np.float64) for t in (grads, TREE, updates))
    np.testing.assert_allclose(u, -0.1 * (16 * np.sign(g) + 0.5 * w), rtol=1e-5)
    g, u = (np.asarray(t["dora"].magnitude) for t in (grads, updates))
    np.testing.assert_allclose(u, -0.1 * np.sign(g), rtol=1e-5)


@pytest.mark.parametrize("inner", [optax.sgd, optax.lion, optax.adam, optax.rmsprop])
def test_any_inner_optimiser(inner):
    plain, grads = inner(0.1), problems.like(TREE)
    both = optax.chain(plain, optim.scale_by_lora_plus(5.0))
    one, _ = plain.update(grads, plain.init(TREE), TREE)
    two, _ = both.update(grads, both.init(TREE), TREE)
    np.testing.assert_allclose(two["svd"].q, 5 * one["svd"].q, rtol=1e-6)
    np.testing.assert_array_equal(two["svd"].p, one["svd"].p)


# n / sqrt(m r), by hand: 6/sqrt(5*2); 4/sqrt(5*2); 4/sqrt(6*2); 6/sqrt(5*2)
WIDTHS = {"dense": 1.897, "stacked": 1.265, "heads": 1.155, "conv": 1.897}


@pytest.mark.parametrize("leaf", WIDTHS)
def test_the_width_rule_reads_the_matrix_not_the_stack(leaf):
    got = ratios(optim.scale_by_lora_plus("auto"), {"w": problems.lora(leaf)})
    np.testing.assert_allclose(got["w.b"], WIDTHS[leaf], atol=1e-3)


def test_the_width_rule_is_16_at_width_2048_and_held_in_range():
    def ratio(n, m, rank):
        lora = Lora(jnp.ones((n, rank)), jnp.ones((rank, m)), 1.0, problems.DENSE)
        return ratios(optim.scale_by_lora_plus("auto"), {"w": lora})["w.b"]

    assert ratio(2048, 2048, 8) == 16
    assert ratio(9000, 1, 1) == 64 and ratio(4, 900, 1) == 1


def test_the_width_rule_takes_the_true_rank_of_a_padded_member():
    adapters = {"w": problems.lora(rank=3)}
    scaled = optim.scale_by_lora_plus("auto")

    @jax.jit
    def second(rank):
        pairs = {"w": PairStatics(1.5, rank)}
        updates, _ = scaled.update(adapters, scaled.init(adapters), pairs=pairs)
        return updates["w"].b / adapters["w"].b

    np.testing.assert_allclose(second(jnp.int32(1)), 6 / math.sqrt(5), rtol=1e-6)


def test_rules_first_match_wins():
    rules = [("attn/.*", 3), ("svd|attn/q", "auto"), (".*", 5.0)]
    got = ratios(optim.lora_plus(1.0, rules, b1=0.0, b2=0.0))
    sizes = {k: v for k, v in got.items() if k in ("attn/q.b", "svd.q", "dora.b")}
    base = ratios(optim.lora_plus(1.0, 1.0, b1=0.0, b2=0.0))
    sizes = {k: round(v / base[k], 3) for k, v in sizes.items()}
    assert sizes == {"attn/q.b": 3, "svd.q": 1.897, "dora.b": 5}


def test_schedules():
    ratio = optax.piecewise_constant_schedule(8.0, {2: 0.25})
    tx = optim.scale_by_lora_plus(ratio)
    assert [ratios(tx, steps=n)["dora.b"] for n in (1, 2, 3, 4)] == [8, 8, 2, 2]
    warm = optim.lora_plus(optax.linear_schedule(0.0, 1.0, 4), ratio)
    still = ratios(warm)
    assert set(still.values()) == {0.0}


def test_the_ratio_is_a_hyperparameter():
    tx = optax.inject_hyperparams(optim.lora_plus)(1.0, ratio=4.0)
    state, grads = tx.init(TREE), problems.like(TREE)
    first, _ = tx.update(grads, state, TREE)
    state.hyperparams["ratio"] = jnp.float32(12)
    second, _ = tx.update(grads, state, TREE)
    np.testing.assert_allclose(second["dora"].b, 3 * first["dora"].b, rtol=1e-6)
    np.testing.assert_array_equal(second["dora"].a, first["dora"].a)


def test_low_precision_keeps_its_dtype():
    adapters = jax.tree.map(lambda v: v.astype(jnp.bfloat16), TREE)
    tx = optim.scale_by_lora_plus(jnp.float32(3))
    updates, _ = tx.update(adapters, tx.init(adapters))
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.bfloat16.dtype}


# Decay


def test_decay_mask_by_role():
    mask = optim.decay_mask(TREE)
    assert jax.tree.structure(mask) == jax.tree.structure(TREE)
    on = {
        (path, field)
        for path, adapter in mask.items()
        for field in adapter.roles
        if getattr(adapter, field)
    }
    factors = [("attn/q", "a"), ("attn/q", "b"), ("dora", "a"), ("dora", "b")]
    assert on == {*factors, ("svd", "p"), ("svd", "lam"), ("svd", "q")}


def test_full_leaves_may_decay_to_where_they_started():
    base = {"params": {"bias": jnp.full(3, 2.0)}}
    tx = optim.lora_plus(0.5, weight_decay=0.1, full_decay=True)
    zero = jax.tree.map(jnp.zeros_like, TREE)
    updates, _ = tx.update(zero, tx.init(TREE), TREE, base=base)
    value = np.asarray(TREE["bias"].value)
    np.testing.assert_allclose(updates["bias"].value, -0.05 * (value - 2), rtol=1e-6)
    assert not np.any(updates["dora"].magnitude)
    lam = -0.05 * np.asarray(TREE["svd"].lam)
    np.testing.assert_allclose(updates["svd"].lam, lam, rtol=1e-6)
    a = np.asarray(TREE["dora"].a)
    np.testing.assert_allclose(updates["dora"].a, -0.05 * a, rtol=1e-6)


# Partitions by role, which separate the second factor from the first


def by_role(adapters):
    return {path: a.replace(**a.roles) for path, a in adapters.items()}


def test_a_partition_by_role():
    roles = ("a", "b", "magnitude", "p", "lam", "q", "value")
    ratio = [(".*", 4.0)]
    tx = optax.partition(
        {
            role: optim.scale_by_lora_plus(ratio if role == "b" else 4.0)
            for role in roles
        },
        by_role,
    )
    got, _ = tx.update(TREE, tx.init(TREE), TREE)
    whole = optim.scale_by_lora_plus(4.0)
    want, _ = whole.update(TREE, whole.init(TREE), TREE)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    for auto in ("auto", [(".*", "auto")]):
        parted = dict.fromkeys(roles, optim.scale_by_lora_plus(auto))
        with pytest.raises(
            ValueError, match=r"'auto'\) reads the factors .* hides .* it"
        ):
            optax.partition(parted, by_role).init(TREE)


# Errors


def test_errors():
    for ratio in (0, -1.0, math.nan, math.inf, jnp.float32(0)):
        with pytest.raises(ValueError, match="ratio=.*number > 0"):
            optim.lora_plus(1e-3, ratio)
    with pytest.raises(ValueError, match="give a number, a schedule or 'auto'"):
        optim.scale_by_lora_plus("width")
    with pytest.raises(ValueError, match="ratio=None; give a single number"):
        optim.scale_by_lora_plus(None)
    with pytest.raises(ValueError, match="give pairs"):
        optim.scale_by_lora_plus(["attn"])
    with pytest.raises(ValueError, match="ratio=-2.0; give a number > 0"):
        optim.scale_by_lora_plus([(".*", -2.0)])
    with pytest.raises(ValueError, match="'attn' does not match any whole path; near"):
        optim.scale_by_lora_plus([("attn", 2.0)]).init(TREE)
    with pytest.raises(ValueError, match="no rule matches 'dora'; end the rules"):
        optim.scale_by_lora_plus([("attn/q", 2.0)]).init(TREE)
    for name, value in (("b1", 1.0), ("b2", -0.1), ("eps", 0.0), ("weight_decay", -1)):
        with pytest.raises(ValueError, match=name):
            optim.lora_plus(1e-3, **{name: value})
    with pytest.raises(ValueError, match="call tx.update.*base=params"):
        tx = optim.add_decayed_weights(0.1, full=True)
        tx.update(TREE, tx.init(TREE), TREE)
    with pytest.raises(KeyError, match="base has no leaf 'bias'"):
        tx.update(TREE, tx.init(TREE), TREE, base={"bais": jnp.ones(3)})
