"""Muon on factors: by hand, orientation, gauge, and what must not become a step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax
from lorax import optim
from lorax.optim import _muon, _polar
from lorax.types import PairStatics
from tests import programs

AXES = lorax.Axes((0,), (1,))


def pair(n=32, m=24, rank=4, scale=0.7, seed=0):
    return lorax.Lora(
        programs.normal(seed, n, rank), programs.normal(seed + 1, rank, m), scale, AXES
    )


def once(grads, adapters, pairs=None, **options):
    tx = optim.scale_by_muon_factors(**options)
    return tx.update(
        {"w": grads}, tx.init({"w": adapters}), {"w": adapters}, pairs=pairs
    )[0]["w"]


def gradients(lora, dense):
    """Gradients of the factors, for a gradient of the kernel."""
    s = lora.scale
    return lora.replace(a=s * dense @ lora.b.T, b=s * lora.a.T @ dense)


def test_one_step_by_hand():
    """rank 1: the polar factor of a vector is its direction; b is scaled by sqrt(2)."""
    lora = lorax.Lora(jnp.array([[1.0], [2.0]]), jnp.array([[3.0, 4.0]]), 1.0, AXES)
    grads = lora.replace(a=jnp.array([[3.0], [-4.0]]), b=jnp.array([[0.0, 5.0]]))
    got = once(grads, lora, factors="both")
    np.testing.assert_allclose(got.a, [[0.6], [-0.8]], rtol=1e-6)
    np.testing.assert_allclose(got.b, [[0, 2**0.5]], rtol=1e-6)
    got = once(grads, lora, factors="b")
    np.testing.assert_array_equal(got.a, grads.a)


def test_the_polar_factor_is_numpys():
    x = programs.normal(0, 2, 9, 4)
    u, _, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    np.testing.assert_allclose(_polar.factor(x), u @ vt, atol=1e-5)


def test_the_step_of_b_is_larger_by_the_root_of_in_over_rank():
    """In the layout [in, out]; the torch rule, naively transposed, would invert it."""
    lora = pair()
    got = once(gradients(lora, programs.normal(3, 32, 24)), lora, factors="both")
    rms = lambda x: np.sqrt(np.mean(np.square(x)))
    np.testing.assert_allclose(rms(got.a), 1 / np.sqrt(32), rtol=1e-4)
    np.testing.assert_allclose(rms(got.b), 1 / np.sqrt(4), rtol=1e-4)
    np.testing.assert_allclose(rms(got.b) / rms(got.a), np.sqrt(32 / 4), rtol=1e-4)


@pytest.mark.parametrize("factors", _muon.CHOICES)
def test_a_zero_gradient_stays_zero_and_rounding_makes_no_step(factors):
    lora = pair().replace(b=jnp.zeros((4, 24)))
    grads = gradients(lora, programs.normal(3, 32, 24))
    assert not grads.a.any()
    got = once(grads, lora, factors=factors)
    assert not got.a.any() and np.isfinite(got.b).all() and got.b.any()
    if factors in ("both", "whitened", "split"):
        noisy = grads.replace(a=1e-10 * programs.normal(4, 32, 4))
        assert not once(noisy, lora, factors=factors).a.any()
    nothing = once(jax.tree.map(jnp.zeros_like, grads), lora, factors=factors)
    assert not nothing.a.any() and not nothing.b.any()


def step_of(lora, update):
    """The kernel's first-order change."""
    return lora.scale * (update.a @ lora.b + lora.a @ update.b)


@pytest.mark.parametrize(
    "factors,invariant",
    [("whitened", True), ("split", True), ("product", True), ("both", False)],
)
def test_whether_the_step_depends_on_how_the_product_is_split(factors, invariant):
    with jax.enable_x64(True):
        lora = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), pair())
        dense = jnp.asarray(programs.normal(3, 32, 24), jnp.float64)
        t = jnp.asarray(np.random.default_rng(0).standard_normal((4, 4)))
        other = lora.replace(a=lora.a @ t, b=jnp.linalg.solve(t, lora.b))
        steps = [
            step_of(x, once(gradients(x, dense), x, factors=factors, damping=0.0))
            for x in (lora, other)
        ]
        off = float(jnp.linalg.norm(steps[0] - steps[1]) / jnp.linalg.norm(steps[0]))
    assert (off < 1e-9) if invariant else (off > 0.1)


def test_product_takes_the_polar_factor_of_the_projected_gradient():
    """In numpy float64: project G onto the tangent space, take polar, project again."""
    with jax.enable_x64(True):
        lora = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), pair())
        dense = np.asarray(programs.normal(3, 32, 24), np.float64)
        got = step_of(
            lora, once(gradients(lora, dense), lora, factors="product", damping=0.0)
        )
    a, b = np.asarray(lora.a), np.asarray(lora.b)
    pa, pb = a @ np.linalg.pinv(a), np.linalg.pinv(b) @ b
    project = lambda g: pa @ g + g @ pb - pa @ g @ pb
    u, s, vt = np.linalg.svd(project(dense), full_matrices=False)
    want = project(u[:, :8] @ vt[:8])  # rank 2r; in > out, so the width scale is 1
    np.testing.assert_allclose(got, want, atol=1e-8)


def test_split_is_steepest_descent_under_the_spectral_norm():
    """In numpy float64: each part of the kernel's step is half a polar factor of G."""
    with jax.enable_x64(True):
        lora = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), pair())
        dense = np.asarray(programs.normal(3, 32, 24), np.float64)
        got = once(gradients(lora, dense), lora, factors="split", damping=0.0)
        own = step_of(lora, got)
        parts = [lora.scale * got.a @ lora.b, lora.scale * lora.a @ got.b]
    a, b = np.asarray(lora.a), np.asarray(lora.b)
    projected = dense @ np.linalg.pinv(b) @ b, a @ np.linalg.pinv(a) @ dense
    for part, g in zip(parts, projected, strict=True):
        u, _, vt = np.linalg.svd(g)
        np.testing.assert_allclose(part, 0.5 * u[:, :4] @ vt[:4], atol=1e-9)
        np.testing.assert_allclose(np.linalg.norm(part, 2), 0.5, rtol=1e-9)
    assert np.linalg.norm(own, 2) <= 1
    draw = np.random.default_rng(0).standard_normal
    for _ in range(20):  # no other step with these norms descends as far
        x, y = draw((32, 4)) @ b, a @ draw((4, 24))
        other = x / np.linalg.norm(x, 2) / 2 + y / np.linalg.norm(y, 2) / 2
        assert np.vdot(dense, other) < np.vdot(dense, own)


def test_split_decay_is_of_the_product():
    """By hand, at rank 1, and on a schedule; magnitude and value keep still."""
    tx = optim.split_decay(2.0, 0.25)
    one = lorax.Lora(jnp.array([[3.0]]), jnp.array([[5.0]]), 1.0, AXES)
    dora = lorax.Dora(*jax.tree.leaves(pair()), jnp.ones(24), 0.7, AXES)
    adapters = {"w": one, "d": dora, "f": lorax.Full(jnp.ones(3))}
    step = jax.tree.map(jnp.zeros_like, adapters)
    step["w"] = one.replace(a=jnp.array([[0.1]]), b=jnp.array([[0.2]]))
    new = optax.apply_updates(adapters, tx.update(step, tx.init(adapters), adapters)[0])
    # half of 15, the first-order step, and 0.1 * 0.2 / half
    want = 0.5 * 15 + (0.1 * 5 + 3 * 0.2) + 0.1 * 0.2 / 0.5
    np.testing.assert_allclose(new["w"].a * new["w"].b, want, rtol=1e-6)
    np.testing.assert_allclose(new["d"].a @ new["d"].b, dora.a @ dora.b / 2, atol=1e-6)
    assert (new["d"].magnitude == 1).all() and (new["f"].value == 1).all()
    tx = optim.split_decay(lambda count: 0.1 * count, 0.5)
    state, nothing = tx.init(adapters), jax.tree.map(jnp.zeros_like, adapters)
    for count in range(3):
        updates, state = tx.update(nothing, state, adapters)
        left = (1 + updates["w"].a[0, 0] / 3) ** 2
        np.testing.assert_allclose(left, 1 - 0.05 * count, rtol=1e-6)
    fine = optim.split_decay(1e-3, 1e-3)  # 1 - sigma would have one digit in float32
    updates, _ = fine.update(nothing, fine.init(adapters), adapters)
    np.testing.assert_allclose(updates["w"].b, -5 * 0.5e-6, rtol=1e-5)


def test_the_chain_of_split_decays_the_product_alone():
    lora = pair()
    tx = optim.muon(0.02, "split", weight_decay=0.5)
    zero = {"w": jax.tree.map(jnp.zeros_like, lora)}
    updates, _ = tx.update(zero, tx.init({"w": lora}), {"w": lora})
    new = optax.apply_updates({"w": lora}, updates)["w"]
    np.testing.assert_allclose(new.a @ new.b, 0.99 * lora.a @ lora.b, atol=1e-6)
    with pytest.raises(ValueError, match="decays the product of a and b past zero"):
        optim.muon(0.5, "split", weight_decay=2.0)
    with pytest.raises(ValueError, match="weight_decay=-1"):
        optim.split_decay(-1.0, 0.1)


def test_momentum_and_the_ready_chain():
    """Adam handles what is not a factor; decay acts only on factors."""
    lora = pair()
    dora = lorax.Dora(*jax.tree.leaves(pair(seed=5)), jnp.ones(24), 0.7, AXES)
    adapters = {"d": dora, "f": lorax.Full(jnp.ones(3)), "w": lora}
    grads = jax.tree.map(jnp.ones_like, adapters)
    tx = optim.muon(0.02, adam_learning_rate=0.001, weight_decay=0.5)
    state = tx.init(adapters)
    updates, state = tx.update(grads, state, adapters)
    for leaf in (updates["d"].magnitude, updates["f"].value):
        np.testing.assert_allclose(leaf, -0.001, rtol=1e-4)
    np.testing.assert_allclose(updates["w"].a, -0.001 * (1 + 0.5 * lora.a), rtol=1e-4)
    zero = jax.tree.map(jnp.zeros_like, adapters)
    fresh = tx.update(zero, tx.init(adapters), adapters)[0]
    assert not fresh["d"].magnitude.any() and not fresh["f"].value.any()
    np.testing.assert_allclose(fresh["w"].b, -0.02 * 0.5 * lora.b, rtol=1e-5)
    plain = optim.scale_by_muon_factors("both", nesterov=False)
    state = plain.init({"w": lora})
    for g in (grads["w"], zero["w"]):
        _, state = plain.update({"w": g}, state, {"w": lora})
    np.testing.assert_allclose(state.momentum["w"].b, 0.95 * 0.05, rtol=1e-5)


def test_optax_weighs_the_momentum_less_in_the_first_steps():
    """Its direction before Newton-Schulz, and ours, from the same numpy gradients."""
    lora, beta = pair(16, 12, 4), 0.95
    ours = optim.scale_by_muon_factors("both", beta)
    theirs = optax.contrib.scale_by_muon(beta=beta, ns_steps=0)
    state, other = ours.init({"w": lora}), theirs.init(lora.a)
    step, their_step = jax.jit(ours.update), jax.jit(theirs.update)
    polar = lambda x: (lambda u, _, vt: u @ vt)(*np.linalg.svd(x, full_matrices=False))
    unit = lambda x: x / np.linalg.norm(x)
    draw, m, apart = np.random.default_rng(0).standard_normal, 0.0, []
    drift = draw((16, 4))
    for t in range(1, 61):
        g = drift + draw((16, 4))
        grads = lora.replace(a=jnp.asarray(g, jnp.float32))
        got, state = step({"w": grads}, state, {"w": lora})
        raw, other = their_step(grads.a, other)
        m = beta * m + (1 - beta) * g
        c = (1 - beta**t) / (1 - beta ** (t + 1))
        u, corrected = (1 - beta) * g + beta * m, (1 - beta) * g + c * beta * m
        np.testing.assert_allclose(got["w"].a, polar(u), atol=1e-5)
        np.testing.assert_allclose(raw, unit(corrected), atol=1e-5)
        apart.append(np.linalg.norm(polar(u) - polar(corrected)) / 2)  # |polar| = 2
    assert apart[0] < 1e-6 and max(apart[50:]) < 0.01
    assert 0.02 < max(apart[1:6]) < 0.1, apart[:6]


@pytest.mark.parametrize("factors", _muon.CHOICES)
def test_stacks_heads_and_the_padding_of_a_population(factors):
    axes = lorax.Axes((1, 2), (3,), (0,))
    lora = lorax.Lora(
        programs.normal(0, 3, 4, 2, 2), programs.normal(1, 3, 2, 6), 0.7, axes
    )
    grads = lora.replace(
        a=programs.normal(2, 3, 4, 2, 2), b=programs.normal(3, 3, 2, 6)
    )
    whole = once(grads, lora, factors=factors)
    one = lambda x: lorax.Lora(x.a[1].reshape(8, 2), x.b[1], 0.7, AXES)
    alone = once(one(grads), one(lora), factors=factors)
    np.testing.assert_allclose(whole.a[1].reshape(8, 2), alone.a, atol=1e-5)
    np.testing.assert_allclose(whole.b[1], alone.b, atol=1e-5)
    pad = lambda x: x.replace(
        a=jnp.pad(x.a, ((0, 0), (0, 1))), b=jnp.pad(x.b, ((0, 1), (0, 0))), scale=9.0
    )
    statics = {"w": PairStatics(jnp.float32(0.7), jnp.int32(2))}
    padded = once(pad(one(grads)), pad(one(lora)), statics, factors=factors)
    assert not padded.a[:, 2].any() and not padded.b[2].any()
    np.testing.assert_allclose(padded.a[:, :2], alone.a, atol=1e-4)
    np.testing.assert_allclose(padded.b[:2], alone.b, atol=1e-4)


def test_the_loss_falls():
    target = programs.normal(0, 16, 2) @ programs.normal(1, 2, 12)
    w = {"w": lorax.Lora(programs.normal(2, 16, 2) / 4, jnp.zeros((2, 12)), 1.0, AXES)}
    loss = lambda w: jnp.mean((w["w"].a @ w["w"].b - target) ** 2)
    for factors in _muon.CHOICES:
        rate = 0.2 if factors == "split" else 0.1  # it halves the step
        tx = optim.muon(rate, factors, adam_learning_rate=0.05)

        @jax.jit
        def step(w, state, tx=tx):
            updates, state = tx.update(jax.grad(loss)(w), state, w)
            return optax.apply_updates(w, updates), state

        now, state = w, tx.init(w)
        for _ in range(150):
            now, state = step(now, state)
        assert loss(now) < 0.2 * loss(w), factors


def test_bad_input():
    with pytest.raises(ValueError, match="factors='a'; choose one of b, both"):
        optim.muon(0.1, "a")
    with pytest.raises(ValueError, match="beta=1"):
        optim.muon(0.1, beta=1.0)
    ada = lorax.AdaLora(jnp.ones((4, 1)), jnp.ones(1), jnp.ones((1, 3)), 1.0, AXES)
    with pytest.raises(ValueError, match="w: .*acts on pairs a and b"):
        optim.muon(0.1).init({"w": ada})
