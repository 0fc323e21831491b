"""Spectral-norm decay against numpy's decompositions and against autodiff."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax
from lorax import optim
from lorax.types import PairStatics
from tests import programs

AXES = lorax.Axes((0,), (1,))
STACK = lorax.Axes((1,), (2,), (0,))


def pair(batch=(), rank=3, scale=0.7, axes=AXES):
    a, b = programs.normal(0, *batch, 8, rank), programs.normal(1, *batch, rank, 6)
    return lorax.Lora(a, b, scale, axes)


def zero(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def decay_of(adapters, base=None, **options):
    """What the transformation adds to zero updates, at strength 1."""
    tx = optim.add_decayed_spectral_norm(1.0, **options)
    extra = {} if base is None else {"base": base}
    return tx.update(zero(adapters), tx.init(adapters), adapters, **extra)[0]


def wide(x):
    return np.asarray(x, np.float64)


def half_square(delta, p):
    """0.5 |delta|_Sp^2 and its gradient, by numpy."""
    u, s, vt = np.linalg.svd(wide(delta), full_matrices=False)
    if p == math.inf:
        return 0.5 * s[0] ** 2, s[0] * np.outer(u[:, 0], vt[0])
    norm = np.sum(s**p) ** (1 / p)
    return 0.5 * norm**2, norm ** (2 - p) * (u * s ** (p - 1)) @ vt


@pytest.mark.parametrize("p", [1.5, 2, 4, 8, math.inf])
def test_the_decay_of_the_update_is_its_gradient(p):
    """grad_a = s dD b^T, grad_b = s a^T dD, with dD from the dense matrix."""
    lora = pair()
    a, b = wide(lora.a), wide(lora.b)
    _, d = half_square(0.7 * a @ b, p)
    got = decay_of({"w": lora}, schatten=p)["w"]
    np.testing.assert_allclose(got.a, 0.7 * d @ b.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got.b, 0.7 * a.T @ d, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("p", [3, 4, 12, math.inf])
def test_float32_keeps_five_digits_of_ill_conditioned_factors(p):
    """Gram matrices square the condition: 1e3 for each factor here."""
    spread = np.logspace(0, -3, 16, dtype=np.float32)
    a, b = (
        programs.normal(0, 96, 16) * spread,
        spread[:, None] * programs.normal(1, 16, 80),
    )
    mix = np.linalg.qr(programs.normal(2, 16, 16))[0]
    a, b = a @ mix, mix.T @ b
    d = half_square(wide(a) @ wide(b), p)[1]
    got = decay_of({"w": lorax.Lora(a, b, 1.0, AXES)}, schatten=p)["w"]
    for found, want in ((got.a, d @ wide(b).T), (got.b, wide(a).T @ d)):
        assert np.linalg.norm(found - want) < 1e-5 * np.linalg.norm(want)


def test_it_is_what_autodiff_makes_of_the_materialised_norm():
    lora = pair((2,), axes=STACK)
    norm = lambda ad: 0.5 * jnp.sum(jnp.linalg.norm(0.7 * ad.a @ ad.b, 2, (1, 2)) ** 2)
    want = jax.grad(norm)(lora)
    got = decay_of({"w": lora})["w"]
    np.testing.assert_allclose(got.a, want.a, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got.b, want.b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("p", [2, 4, math.inf])
def test_the_factors_decay_each_by_itself(p):
    lora = pair()
    got = decay_of({"w": lora}, target="factors", schatten=p)["w"]
    np.testing.assert_allclose(got.a, half_square(lora.a, p)[1], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got.b, half_square(lora.b, p)[1], rtol=1e-4, atol=1e-4)
    if p == 2:  # ordinary weight decay
        np.testing.assert_allclose(got.a, lora.a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"schatten": 4}, {"target": "factors"}])
def test_nothing_fails_at_zero_or_at_a_repeated_singular_value(options):
    fresh = pair().replace(b=jnp.zeros((3, 6)))
    got = decay_of({"w": fresh}, **options)["w"]
    assert np.isfinite(got.a).all() and not got.b.any()
    still = pair().replace(a=jnp.zeros((8, 3)))
    got = decay_of({"w": still}, **options)["w"]
    assert np.isfinite(got.b).all() and not got.a.any()
    twin = lorax.Lora(jnp.eye(8, 3), 2 * jnp.eye(3, 6), 1.0, AXES)
    got = decay_of({"w": twin}, **options)["w"]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))


def test_decay_alone_moves_the_largest_singular_value_alone():
    """Balanced a and b each shrink by lr lam s sigma_1 along it; the rest stays."""
    u, v = (
        np.linalg.qr(programs.normal(0, 8, 3))[0],
        np.linalg.qr(programs.normal(1, 6, 3))[0],
    )
    s = np.array([4.0, 2.0, 1.0])
    w = {
        "w": lorax.Lora(jnp.asarray(u * s**0.5), jnp.asarray((v * s**0.5).T), 1.0, AXES)
    }
    tx = optax.chain(
        optim.add_decayed_spectral_norm(0.01), optax.scale_by_learning_rate(1.0)
    )
    updates, _ = tx.update(zero(w), tx.init(w), w)
    after = optax.apply_updates(w, updates)["w"]
    got = np.linalg.svd(after.a @ after.b)[1][:3]
    # each factor's column shrinks by 1 - lr lam sigma_1, for s = 1
    np.testing.assert_allclose(got, [4 * (1 - 0.04) ** 2, 2, 1], rtol=1e-5)


def run(tx, w, steps, **extra):
    @jax.jit
    def step(w, state):
        updates, state = tx.update(zero(w), state, w, **extra)
        return optax.apply_updates(w, updates), state

    state = tx.init(w)
    for _ in range(steps):
        w, state = step(w, state)
    return w, state


def test_merged_grows_the_adapter_and_delta_shrinks_it():
    base = {"w": programs.normal(2, 8, 6)}
    w = {"w": pair().replace(b=0.01 * pair().b)}
    size = lambda w: np.linalg.norm(w["w"].delta(base["w"]), 2)
    for target, grows in (("merged", True), ("delta", False)):
        tx = optax.chain(
            optim.add_decayed_spectral_norm(0.5, target=target),
            optax.scale_by_learning_rate(0.1),
        )
        after, _ = run(tx, w, 60, base=base)
        assert (size(after) > 5 * size(w)) if grows else (size(after) < size(w))
        if grows:
            whole = lambda w: np.linalg.norm(lorax.merge(w, base)["w"], 2)
            assert whole(after) < 0.9 * whole(w)


@pytest.mark.parametrize("adapter", ["lora", "dora", "adalora", "loha"])
def test_merged_is_the_gradient_of_the_merged_kernels_norm(adapter):
    """Once the iteration has converged; magnitudes do not move."""
    base = {"w": programs.normal(2, 3, 8, 6)}
    fn = lambda params, x: jax.lax.scan(
        lambda x, w: (x @ w @ w.T, None), x, params["w"]
    )
    kernels = lorax.discover(fn, base, jnp.ones((1, 8)))
    target = lorax.Target("w", rank=2, adapter=adapter, layers=(0, 2))
    adapters, _ = lorax.init(jax.random.key(0), base, target, kernels)
    adapters = programs.perturbed(adapters)
    tx = optim.add_decayed_spectral_norm(1.0, target="merged")
    state = tx.init(adapters)
    update = jax.jit(lambda s: tx.update(zero(adapters), s, adapters, base=base))
    for _ in range(200):
        got, state = update(state)

    def norm(adapters):
        w = lorax.merge(adapters, base)["w"][jnp.array([0, 2])]
        return 0.5 * jnp.sum(jnp.linalg.norm(w, 2, (1, 2)) ** 2)

    want = jax.grad(norm)(adapters)["w"]
    for field, role in want.roles.items():
        found = getattr(got["w"], field)
        if role == "magnitude":
            assert not found.any()
        else:
            np.testing.assert_allclose(
                found, getattr(want, field), rtol=2e-3, atol=2e-3
            )


def test_decay_alone_brings_the_merged_kernel_of_adalora_to_zero():
    """On a zero base W = x y lam u v^T, so three scalars describe it."""
    u, v = (np.linalg.qr(programs.normal(i, n, 1))[0] for i, n in ((0, 8), (1, 6)))
    ada = lorax.AdaLora(jnp.asarray(u), jnp.full(1, 3.0), jnp.asarray(v.T), 1.0, AXES)
    tx = optax.chain(
        optim.add_decayed_spectral_norm(1.0, target="merged"), optax.scale(-0.1)
    )
    after, _ = run(tx, {"w": ada}, 40, base={"w": jnp.zeros((8, 6))})
    x, lam, y = 1.0, 3.0, 1.0
    for _ in range(40):
        sigma = lam * x * y  # the gradients of sigma^2 / 2
        x, lam, y = (
            x - 0.1 * sigma * lam * y,
            lam - 0.1 * sigma * x * y,
            y - 0.1 * sigma * lam * x,
        )
    got = after["w"]
    np.testing.assert_allclose(got.p, x * u, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got.lam, [lam], rtol=1e-4)
    np.testing.assert_allclose(got.q, y * v.T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("target", ["delta", "factors", "merged"])
def test_the_strength_may_follow_a_schedule(target):
    """1, 1, 0.3: the same as using the numbers themselves, step by step."""
    base = {"w": programs.normal(2, 8, 6)}
    adapters = {"w": pair()}
    schedule = optax.piecewise_constant_schedule(1.0, {2: 0.3})
    extra = {"base": base} if target == "merged" else {}
    results = []
    for strength in (schedule, 1.0, 0.3):
        tx = optim.add_decayed_spectral_norm(strength, target)
        state, found = tx.init(adapters), []
        for _ in range(3):
            got, state = tx.update(zero(adapters), state, adapters, **extra)
            found.append(np.asarray(got["w"].a))
        results.append(found)
    followed, full, less = results
    for got, want in zip(followed, [*full[:2], less[2]], strict=True):
        np.testing.assert_array_equal(got, want)
    assert np.abs(full[2]).max() > 2 * np.abs(less[2]).max() > 0


def test_a_plain_tree_and_full_leaves_by_power_iteration():
    conv = programs.normal(1, 3, 4, 6)
    params = {
        "conv": conv,
        "w": programs.normal(0, 8, 6).astype(jnp.bfloat16),
        "b": jnp.ones(3),
    }
    kernels = {
        "conv": lorax.Kernel(
            "conv", conv.shape, conv.dtype, "conv", lorax.Axes((0, 1), (2,))
        )
    }
    tx = optim.add_decayed_spectral_norm(1.0, target="param", kernels=kernels)
    state = tx.init(params)
    for _ in range(100):
        got, state = tx.update(zero(params), state, params)
    want = half_square(conv.reshape(12, 6), math.inf)[1].reshape(conv.shape)
    np.testing.assert_allclose(got["conv"], want, rtol=1e-3, atol=1e-3)
    want = half_square(params["w"].astype(jnp.float32), math.inf)[1]
    np.testing.assert_allclose(got["w"].astype(jnp.float32), want, rtol=0.01, atol=0.01)
    assert got["w"].dtype == jnp.bfloat16 and not got["b"].any()
    full = {"w": lorax.Full(programs.normal(0, 8, 6))}
    assert decay_of(full, target="param")["w"].value.any()


def test_the_warm_start_follows_a_drifting_kernel():
    drift = programs.normal(1, 8, 6) / 300
    params = {"w": jnp.diag(jnp.arange(8.0, 0, -1))[:, :6]}
    tx = optim.add_decayed_spectral_norm(1.0, target="param")
    state = tx.init(params)
    for _ in range(150):
        params = jax.tree.map(lambda w: w + drift, params)
        got, state = tx.update(zero(params), state, params)
    want = half_square(params["w"], math.inf)[1]
    assert np.linalg.norm(got["w"] - want) < 0.02 * np.linalg.norm(want)


@pytest.mark.parametrize("scale", [0.7, -2.0])
def test_the_clip_bounds_every_singular_value_of_the_update(scale):
    w = {"w": pair((2,), scale=scale, axes=STACK)}
    tx = optax.chain(optax.sgd(1.0), optim.clip_spectral_norm(1.5))
    grads = jax.tree.map(lambda x: 0.1 * x, w)
    updates, _ = tx.update(grads, tx.init(w), w)
    before = np.linalg.svd(wide(scale * 0.81 * w["w"].a @ w["w"].b))
    after = optax.apply_updates(w, updates)["w"]
    u, s, vt = (np.asarray(x) for x in before)
    want = u[:, :, :6] * np.minimum(s, 1.5)[:, None] @ vt
    np.testing.assert_allclose(scale * after.a @ after.b, want, atol=1e-4)
    small = jax.tree.map(lambda x: x / 100, w)
    updates, _ = tx.update(zero(small), tx.init(small), small)
    assert all(np.abs(x).max() < 1e-8 for x in jax.tree.leaves(updates))


def test_the_padding_of_a_population_stays_zero():
    padded = pair(rank=3)
    padded = padded.replace(a=padded.a.at[:, 2].set(0), b=padded.b.at[2].set(0))
    statics = {"w": PairStatics(jnp.float32(0.3), jnp.int32(2))}
    cut = padded.replace(a=padded.a[:, :2], b=padded.b[:2], scale=0.3)
    for tx in (optim.add_decayed_spectral_norm(1.0), optim.clip_spectral_norm(0.1)):
        one = tx.update(
            zero({"w": padded}), tx.init({"w": padded}), {"w": padded}, pairs=statics
        )
        own = tx.update(zero({"w": cut}), tx.init({"w": cut}), {"w": cut})
        got, want = one[0]["w"], own[0]["w"]
        assert not got.a[:, 2].any() and not got.b[2].any()
        np.testing.assert_allclose(got.a[:, :2], want.a, atol=1e-5)
        np.testing.assert_allclose(got.b[:2], want.b, atol=1e-5)


def test_bad_input():
    decay = optim.add_decayed_spectral_norm
    w, plain = {"w": pair()}, {"w": jnp.ones((3, 2))}
    with pytest.raises(ValueError, match="target='whole'; choose one of delta"):
        decay(0.1, target="whole")
    with pytest.raises(ValueError, match="weight_decay=-1"):
        decay(-1.0)
    with pytest.raises(ValueError, match="schatten=0.5 .*>= 1"):
        decay(0.1, schatten=0.5)
    with pytest.raises(ValueError, match="here only infinity: power iteration"):
        decay(0.1, target="merged", schatten=4)
    with pytest.raises(ValueError, match="acts on the adapters that lorax.init"):
        decay(0.1).init(plain)
    with pytest.raises(ValueError, match="reads the adapters"):
        decay(0.1).update(w, decay(0.1).init(w))
    with pytest.raises(ValueError, match="base=params"):
        decay_of(w, target="merged")
    with pytest.raises(ValueError, match="found no matrix"):
        decay(0.1, target="param").init(w)
    with pytest.raises(ValueError, match="w: the shape .2, 3, 4. does not say"):
        decay(0.1, target="param").init({"w": jnp.ones((2, 3, 4))})
    injected = optax.inject_hyperparams(decay)
    assert injected(weight_decay=0.1).init(w).hyperparams.keys() == {"weight_decay"}
    with pytest.raises(ValueError, match="static_args"):
        jax.eval_shape(injected(weight_decay=0.1, schatten=4.0).init, w)
    with pytest.raises(ValueError, match="tau=0"):
        optim.clip_spectral_norm(0.0)
    ada = lorax.AdaLora(jnp.ones((4, 1)), jnp.ones(1), jnp.ones((1, 3)), 1.0, AXES)
    for tx in (decay(0.1), optim.clip_spectral_norm(1.0)):
        with pytest.raises(ValueError, match="w: .*acts on pairs a and b"):
            tx.init({"w": ada})
