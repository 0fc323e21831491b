"""Scaled gradient descent and LoRA-FA against numpy float64 solves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax import optim
from lorax.types import PairStatics
from tests.optim import problems

S, R = 1.5, 2


def parts(*trees):
    """a and b of every tree in numpy's float64."""
    return [np.asarray(f, np.float64) for t in trees for f in (t["w"].a, t["w"].b)]


def one_update(tx, adapters, grads, **extra):
    return tx.update(grads, tx.init(adapters), adapters, **extra)[0]


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_scaled_gradients_by_solves(damping, relative):
    adapters = {"w": problems.lora()}
    grads = problems.like(adapters)
    updates = one_update(optim.scale_by_gram(damping, relative), adapters, grads)
    a, b, ga, gb, ua, ub = parts(adapters, grads, updates)
    n, m = a.T @ a, b @ b.T
    d = damping * (max(np.trace(n), np.trace(m)) / R if relative else 1)
    np.testing.assert_allclose(ua, ga @ np.linalg.inv(m + d * np.eye(R)), rtol=1e-4)
    np.testing.assert_allclose(ub, np.linalg.inv(n + d * np.eye(R)) @ gb, rtol=1e-4)


def test_the_overlap_of_the_factors_is_counted_twice():
    """s (uA B + A uB) = s^2 (G P_B + P_A G), against projectors by numpy's qr."""
    adapters = {"w": problems.lora()}
    a, b = parts(adapters)
    g = np.random.default_rng(3).normal(size=(6, 5))
    lora = adapters["w"].replace(
        a=jnp.asarray(S * g @ b.T, jnp.float32), b=jnp.asarray(S * a.T @ g, jnp.float32)
    )
    updates = one_update(optim.scale_by_gram(0.0), adapters, {"w": lora})
    ua, ub = parts(updates)
    qa, qb = np.linalg.qr(a)[0], np.linalg.qr(b.T)[0]
    want = S**2 * (g @ qb @ qb.T + qa @ qa.T @ g)
    np.testing.assert_allclose(S * (ua @ b + a @ ub), want, atol=1e-4)


def test_the_kernel_moves_alike_whatever_the_gauge_of_its_factors():
    t = np.array([[2.0, 0.3], [0.1, 0.7]])
    adapters = {"w": problems.lora()}
    a, b = parts(adapters)
    g = np.random.default_rng(4).normal(size=(6, 5))

    def moved(a, b):
        make = lambda x, y: {
            "w": adapters["w"].replace(
                a=jnp.asarray(x, jnp.float32), b=jnp.asarray(y, jnp.float32)
            )
        }
        updates = one_update(
            optim.scale_by_gram(0.0), make(a, b), make(S * g @ b.T, S * a.T @ g)
        )
        ua, ub = parts(updates)
        return ua @ b + a @ ub

    np.testing.assert_allclose(moved(a @ t, np.linalg.inv(t) @ b), moved(a, b), 1e-3)


def test_the_second_step_from_zero_is_bounded():
    grads = problems.like({"w": problems.lora()})
    for lr in (1e-1, 1e-3):
        small = {"w": problems.lora(b=lr)}
        g = grads["w"].replace(a=lr * grads["w"].a)  # proportional to b
        update = one_update(optim.scale_by_gram(), small, {"w": g})["w"].a
        assert lr * np.linalg.norm(update) < 10 * lr**2 * np.linalg.norm(small["w"].a)
    zero = {"w": problems.lora(b=0.0)}
    g = {"w": grads["w"].replace(a=0 * grads["w"].a)}
    for damping in (0.0, 0.1):
        updates = one_update(optim.scale_by_gram(damping), zero, g)
        assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
        assert not np.any(updates["w"].a) and np.any(updates["w"].b)


def test_lora_fa_is_the_gradient_projected_on_the_columns_of_a():
    adapters = {"w": problems.lora(b=0.3), "bias": problems.full()}
    grads = problems.like(adapters)
    a, b = parts(adapters)
    g = np.random.default_rng(5).normal(size=(6, 5))
    grads["w"] = grads["w"].replace(b=jnp.asarray(S * a.T @ g, jnp.float32))
    updates = one_update(optim.scale_by_lora_fa(0.0), adapters, grads)
    ua, ub = parts(updates)
    q = np.linalg.qr(a)[0]
    np.testing.assert_allclose(S * a @ ub, q @ q.T @ g, atol=1e-5)
    assert not ua.any()
    np.testing.assert_array_equal(updates["bias"].value, grads["bias"].value)


def test_lora_fa_leaves_a_still_and_keeps_no_moments_of_it():
    adapters = {"w": problems.dora(), "bias": problems.full()}
    tx = optim.lora_fa(0.1, weight_decay=0.5, eps=1e-12)
    updates = one_update(tx, adapters, problems.like(adapters))
    assert not np.any(updates["w"].a) and np.all(updates["w"].b)
    np.testing.assert_allclose(np.abs(updates["w"].magnitude), 0.1, rtol=1e-4)
    np.testing.assert_allclose(np.abs(updates["bias"].value), 0.1, rtol=1e-4)
    floats = [v for v in jax.tree.leaves(tx.init(adapters)) if v.dtype == jnp.float32]
    assert sum(v.size for v in floats) == 2 * (R * 5 + 5 + 3)


def test_lora_fa_damping_is_of_a_alone():
    adapters = {"w": problems.lora(b=100.0)}
    grads = problems.like(adapters)
    updates = one_update(optim.scale_by_lora_fa(0.1), adapters, grads)
    a, _, _, gb, _, ub = parts(adapters, grads, updates)
    n = a.T @ a
    n += 0.1 * np.trace(n) / R * np.eye(R)
    np.testing.assert_allclose(ub, np.linalg.inv(n) @ gb / S**2, rtol=1e-4)


@pytest.mark.parametrize("make", [optim.scale_by_gram, optim.scale_by_lora_fa])
def test_padding_stays_exactly_zero(make):
    lora = problems.lora(rank=4, b=0.0)
    real = jnp.arange(4) < 2
    wide = {"w": lora.replace(a=jnp.where(real, lora.a, 0))}
    g = problems.like(wide)["w"]
    g = {"w": g.replace(a=0 * g.a, b=jnp.where(real[:, None], g.b, 0))}
    update = jax.jit(
        lambda scale, rank: one_update(
            make(), wide, g, pairs={"w": PairStatics(scale, rank)}
        )["w"]
    )(jnp.float32(S), jnp.int32(2))
    cut = lambda v: {"w": v.replace(a=v.a[:, :2], b=v.b[:2])}
    alone = one_update(make(), cut(wide["w"]), cut(g["w"]))["w"]
    np.testing.assert_allclose(update.b[:2], alone.b, rtol=1e-3)
    assert not np.any(update.a) and not np.any(update.b[2:])


def test_errors():
    for make in (optim.scale_by_gram, optim.scale_by_lora_fa):
        with pytest.raises(ValueError, match="damping=-1.0; give a number of at least"):
            make(-1.0)
        with pytest.raises(ValueError, match="w: .* the p, lam, q of AdaLora"):
            make().init({"w": problems.adalora()})
    zero = problems.lora()
    zero = {"w": zero.replace(a=0 * zero.a)}
    with pytest.raises(ValueError, match="w: LoRA-FA freezes a, and this one is zero"):
        optim.lora_fa(1e-3).init(zero)
