"""LoRA-XS and LoRA-SB: cores between numpy's singular vectors; moments of a core."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax
from tests import programs
from tests.adapters import reference

TARGET = lorax.Target("w", rank=3, alpha=6, adapter="lora_xs")


def test_update_and_gradients_by_hand():
    """dR = s (U S)^T G V, whatever signs the singular vectors have."""
    case = reference.case(TARGET)
    u, s, vt = np.linalg.svd(case.kernel)
    a, b, core = (case.fields[name] for name in ("a", "b", "core"))
    best = u[:, :3] * s[:3] @ vt[:3]
    reference.assert_close(a @ b, best)  # a = U S and b = V^T, up to one sign each
    reference.assert_close(b @ b.T, np.eye(3))
    reference.assert_close(np.sqrt((a**2).sum(0)), s[:3])
    reference.assert_close(case.delta, 2 * a @ core @ b, 1e-5)
    reference.assert_gradients(case, {"core": 2 * a.T @ case.cotangent @ b.T})


def test_the_optimiser_keeps_two_moments_of_the_core_and_scalars():
    params = {"w": programs.normal(0, 4, 60, 50)}
    kernels = lorax.discover(
        lambda p: jnp.einsum("i,lio->lo", jnp.ones(60), p["w"]), params
    )
    target = lorax.Target("w", rank=6, adapter="lora_xs", batch_axes=(0,))
    adapters, base = lorax.init(jax.random.key(0), params, target, kernels)
    state = optax.adamw(1e-3).init(adapters)
    sizes = sorted(np.size(leaf) for leaf in jax.tree.leaves(state))
    core = adapters["w"].core.size
    assert core == 4 * 6 * 6
    assert [n for n in sizes if n > 1] == [core, core]
    assert base.frozen["w/lora_xs/a"].shape == (4, 60, 6)


def gradient_start(step=None, rank=2):
    x, c = programs.normal(4, 5, 7), programs.normal(5, 5, 6)
    params = {"w": programs.normal(1, 7, 6)}
    options = {} if step is None else {"step": step}
    target = lorax.Target(
        "w", rank=rank, alpha=5, adapter="lora_xs", init="lora_sb", options=options
    )
    loss = lambda params, batch: jnp.sum(c * (batch @ params["w"]))
    stats = lorax.calibrate(jax.random.key(0), loss, params, target, [x], passes=8)
    adapters, base = lorax.init(jax.random.key(1), params, target, stats=stats)
    moved = lorax.merge(adapters, base)["w"] - params["w"]
    return adapters["w"], base, reference.wide(moved), reference.wide(x.T @ c)


def test_lora_sb_starts_with_the_best_first_step():
    """A step of 1/128, the default, along the best rank-r part of -G, G = x^T C."""
    adapter, base, moved, g = gradient_start()
    u, s, vt = np.linalg.svd(g)
    best = u[:, :2] * s[:2] @ vt[:2] / s[0]
    np.testing.assert_allclose(moved, -best / 128, atol=2e-6)
    a, b = (reference.wide(base.frozen[name]) for _, name in adapter.lent)
    np.testing.assert_allclose(a.T @ a, np.eye(2), atol=1e-5)
    np.testing.assert_allclose(b @ b.T, np.eye(2), atol=1e-5)


def test_lora_sb_may_start_at_the_kernel():
    adapter, _, moved, _ = gradient_start(step=0)
    assert not moved.any() and not adapter.core.any()


@pytest.mark.parametrize("step", [-1.0, float("inf"), "1/128", True])
def test_a_step_that_is_no_size_is_refused(step):
    with pytest.raises(ValueError, match="step=.*; give a number >= 0"):
        gradient_start(step)


def test_lora_sb_is_of_lora_xs_alone():
    target = lorax.Target("w", init="lora_sb")
    with pytest.raises(ValueError, match="no from_bases; use it with lora_xs"):
        lorax.init(jax.random.key(0), {"w": jnp.ones((9, 9))}, target)
