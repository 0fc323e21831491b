"""Decay of adapters: numbers by hand, limits, what it leaves alone, errors."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lorax import optim
from lorax.adapters import Dora, Full, Lora
from tests.optim import problems

ROLES = ("a", "b", "p", "lam", "q", "magnitude", "value")

TREE = {
    "attn/q": problems.lora(),
    "stack": problems.lora("stacked", seed=10),
    "dora": problems.dora("heads", seed=20),
    "svd": problems.adalora("conv", seed=30),
    "head/bias": problems.full(),
}
BASE = {"params": {"head": {"bias": jnp.array([2.1, 0.0, -1.0])}}}


def zeros(adapters=TREE):
    return jax.tree.map(jnp.zeros_like, adapters)


def one_update(tx, adapters=TREE, **extra):
    return tx.update(zeros(adapters), tx.init(adapters), adapters, **extra)[0]


def trained(tx, steps, **extra):
    """The adapters after some steps with zero gradients."""
    adapters, state = TREE, tx.init(TREE)
    for _ in range(steps):
        updates, state = tx.update(zeros(), state, adapters, **extra)
        adapters = optax.apply_updates(adapters, updates)
    return adapters


def test_by_hand():
    # w = 4, g = 1, strength 0.5, rate 0.1: -0.1 (1 + 0.5 * 4) = -0.3
    dora = Dora(
        jnp.array([[4.0]]), jnp.array([[-2.0]]), jnp.array([9.0]), 1.0, problems.DENSE
    )
    adapters = {"w": dora, "bias": Full(jnp.array([8.0]))}
    grads = jax.tree.map(jnp.ones_like, adapters)
    tx = optax.chain(optim.add_decayed_weights(0.5), optax.scale(-0.1))
    updates, _ = tx.update(grads, tx.init(adapters), adapters)
    np.testing.assert_allclose(updates["w"].a, [[-0.3]], rtol=1e-6)
    np.testing.assert_allclose(updates["w"].b, [[0.0]], atol=1e-8)  # 1 - 0.5 * 2
    np.testing.assert_allclose(updates["w"].magnitude, [-0.1], rtol=1e-6)
    np.testing.assert_allclose(updates["bias"].value, [-0.1], rtol=1e-6)


def test_the_kernel_returns_to_its_pretrained_value():
    """Both factors shrink by 1 - lr wd per step, so the product by its square."""
    tx = optax.chain(optim.add_decayed_weights(0.5), optax.scale(-0.2))
    after = trained(tx, 3)
    for path, shape in (("attn/q", (6, 5)), ("stack", (3, 4, 5))):
        before = np.asarray(TREE[path].delta(jnp.zeros(shape)), np.float64)
        got = after[path].delta(jnp.zeros(shape))
        np.testing.assert_allclose(got, 0.9**6 * before, rtol=1e-5)
    for field in ("p", "lam", "q"):
        want = 0.9**3 * np.asarray(getattr(TREE["svd"], field), np.float64)
        np.testing.assert_allclose(getattr(after["svd"], field), want, rtol=1e-5)


@pytest.mark.parametrize("full", [False, True])
def test_magnitude_and_value_keep_still(full):
    """Bit for bit; a Full leaf moves only if asked to."""
    tx = optax.chain(optim.add_decayed_weights(0.5, full), optax.scale(-0.2))
    after = trained(tx, 3, base=BASE)
    same = np.testing.assert_array_equal
    same(after["dora"].magnitude, TREE["dora"].magnitude)
    value = np.asarray(TREE["head/bias"].value, np.float64)
    if not full:
        same(after["head/bias"].value, TREE["head/bias"].value)
    else:
        base = np.array([2.1, 0.0, -1.0])
        want = base + 0.9**3 * (value - base)
        np.testing.assert_allclose(after["head/bias"].value, want, rtol=1e-5)


def test_a_full_leaf_at_its_base_has_nothing_to_decay():
    adapters = {"head/bias": Full(BASE["params"]["head"]["bias"])}
    updates = one_update(optim.add_decayed_weights(7.0, full=True), adapters, base=BASE)
    assert not np.any(updates["head/bias"].value)


def test_only_the_leaves_of_full_adapters_are_read_from_the_base():
    """Everywhere else the base may be quantised, or hold keys and counters."""
    base = {
        "head": {"bias": jnp.array([2.0, 0.0, -1.0], jnp.bfloat16)},
        "attn": {"q": jnp.ones((6, 5), jnp.int8)},
        "key": jax.random.key(0),
    }
    updates = one_update(optim.add_decayed_weights(1.0, full=True), base=base)
    value = TREE["head/bias"].value
    assert updates["head/bias"].value.dtype == value.dtype
    want = np.asarray(value, np.float64) - [2, 0, -1]
    np.testing.assert_allclose(updates["head/bias"].value, want, rtol=1e-6)


def test_roles_narrow_it():
    updates = one_update(optim.add_decayed_weights(2.0, roles=("b",)))
    moved = {
        (path, field)
        for path, adapter in updates.items()
        for field in adapter.roles
        if np.any(getattr(adapter, field))
    }
    assert moved == {("attn/q", "b"), ("stack", "b"), ("dora", "b")}


def test_the_strength_may_follow_a_schedule():
    tx = optim.add_decayed_weights(optax.piecewise_constant_schedule(1.0, {2: 0.25}))
    state, a, strengths = tx.init(TREE), np.asarray(TREE["dora"].a), []
    for _ in range(4):
        updates, state = tx.update(zeros(), state, TREE)
        strengths.append(float(np.mean(updates["dora"].a / a)))
    np.testing.assert_allclose(strengths, [1, 1, 0.25, 0.25], rtol=1e-6)


def test_the_strength_is_a_hyperparameter_of_every_member_of_a_population():
    """When traced it is not validated; one base serves all members."""
    make = optax.inject_hyperparams(optim.add_decayed_weights, static_args="roles")

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def update(strength, base):
        tx = make(strength, full=True)
        return tx.update(zeros(), tx.init(TREE), TREE, base=base)[0]

    updates = update(jnp.array([0.0, 1.0, 3.0]), BASE)
    for field in (updates["svd"].q, updates["head/bias"].value):
        one = np.asarray(field[1])
        assert np.any(one) and not np.any(field[0])
        np.testing.assert_allclose(field[2], 3 * one, rtol=1e-6)
    np.testing.assert_allclose(updates["svd"].q[1], TREE["svd"].q, rtol=1e-6)


def test_the_mask_reads_abstract_adapters_and_serves_optax():
    abstract = jax.eval_shape(lambda: TREE)
    mask = optim.decay_mask(abstract)
    assert jax.tree.structure(mask) == jax.tree.structure(TREE)
    assert (mask["dora"].a, mask["dora"].magnitude) == (True, False)
    assert (mask["svd"].q, mask["svd"].lam) == (True, True)
    theirs = optax.add_decayed_weights(0.3, mask=optim.decay_mask)
    ours = optim.add_decayed_weights(0.3)
    pair = one_update(theirs), one_update(ours)
    jax.tree.map(np.testing.assert_array_equal, *pair)


def test_a_partition_by_role_decays_what_it_would_have_decayed():
    """With labels that separate a from b, the mask and the decay still go by role."""
    by_role = lambda adapters: {p: a.replace(**a.roles) for p, a in adapters.items()}
    rules = {role: optim.add_decayed_weights(0.3) for role in ROLES}
    got, want = optax.partition(rules, by_role), optim.add_decayed_weights(0.3)
    jax.tree.map(np.testing.assert_array_equal, one_update(got), one_update(want))
    rules = {
        role: optax.add_decayed_weights(0.3, mask=optim.decay_mask) for role in ROLES
    }
    got = one_update(optax.partition(rules, by_role))
    jax.tree.map(np.testing.assert_array_equal, got, one_update(want))


def test_the_mask_as_the_message_says():
    make = optax.inject_hyperparams(optax.adamw, static_args=("mask",))
    tx = make(0.1, weight_decay=0.3, mask=optim.decay_mask)
    plain = optax.adamw(0.1, weight_decay=0.3, mask=optim.decay_mask)
    pair = one_update(tx), one_update(plain)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), *pair)


@pytest.mark.parametrize(
    "tx",
    [
        optim.lora_plus(0.1),
        optim.lora_pro(0.1),
        optax.adamw(0.1, mask=optim.decay_mask),
    ],
)
def test_a_models_own_parameters_are_refused(tx):
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="tx.init.adapters.*nnx.Optimizer.model, tx"):
        nnx.Optimizer(model, tx, wrt=nnx.Param)


def test_errors():
    for strength in (-0.1, math.nan, math.inf, jnp.float32(-1)):
        with pytest.raises(ValueError, match="weight_decay=.*number of at least 0"):
            optim.add_decayed_weights(strength)
    with pytest.raises(ValueError, match="weight_decay='0.1'; give a single number"):
        optim.add_decayed_weights("0.1")
    tx = optim.add_decayed_weights(0.1)
    plain = {"w": {"kernel": jnp.ones((2, 2))}}
    for function in (tx.init, optim.decay_mask):
        with pytest.raises(ValueError, match="adapters that lorax.init returns"):
            function(plain)
    with pytest.raises(ValueError, match="reads the adapters: call tx.update"):
        tx.update(zeros(), tx.init(TREE))
    odd = {"odd": problems.Gated(jnp.ones(2), jnp.ones(2))}
    for function in (tx.init, optim.decay_mask):
        with pytest.raises(ValueError, match="odd: .* Gated declares none"):
            function(odd)
    make = optax.inject_hyperparams(optax.adamw)(0.1, mask=optim.decay_mask)
    with pytest.raises(ValueError, match=r"a number: .* static_args=\('mask',\)"):
        make.init(TREE)
    lora = TREE["attn/q"]
    wide = Lora(lora.a.astype(jnp.complex64), lora.b, 1.0, problems.DENSE)
    with pytest.raises(ValueError, match="attn/q: .* real factors, but these are com"):
        tx.init({"attn/q": wide})
    to_base = optim.add_decayed_weights(0.1, full=True)
    with pytest.raises(ValueError, match="update.grads, state, adapters, base=params"):
        one_update(to_base)
    with pytest.raises(KeyError, match="base has no leaf 'head/bias'; nearest paths"):
        one_update(to_base, base={"head": {"bais": jnp.ones(3)}})
