"""EVA and CorDA by their own equations, in float64, with the inverse written out."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax.inits import eva
from lorax.types import ActivationStats, Covariance
from tests import programs
from tests.test_inits import made

KEY = jax.random.key(0)
W = programs.normal(1, 12, 9)


def rows(n=50, size=12, power=1.0):
    """Inputs with a spectrum and a mean."""
    scales = np.arange(1.0, size + 1) ** -power
    turn, _ = np.linalg.qr(np.asarray(programs.normal(5, size, size), np.float64))
    return np.asarray(programs.normal(4, n, size), np.float64) * scales @ turn + 0.3


def components(x, k=None):
    _, s, vt = np.linalg.svd(x - x.mean(0), full_matrices=False)
    s = s / np.sqrt(len(x))
    parts = vt[:k].T, s[:k], x.var(0).sum(), len(x)
    return ActivationStats(*(jnp.asarray(part, jnp.float32) for part in parts))


def moments(x):
    matrix = jnp.asarray(x.T @ x / len(x), jnp.float32)
    return Covariance(matrix, jnp.float32(len(x)))


def test_eva_reads_the_components_and_starts_from_zero():
    x = rows()
    lora, after = made(W, components(x, 6), init="eva")
    assert after is W and not lora.b.any() and lora.moved_by is None
    _, vectors = np.linalg.eigh(np.cov(x.T))
    np.testing.assert_allclose(
        np.abs(vectors[:, ::-1][:, :3].T @ lora.a), np.eye(3), atol=1e-4
    )
    white, _ = made(W, components(x, 6), init="eva", options={"whiten": True})
    np.testing.assert_allclose(np.std(x @ np.asarray(white.a), axis=0), 1, rtol=1e-4)


def test_no_other_start_gives_the_first_step_of_b_more_in_expectation():
    """E |a^T X^T D|^2 for centred inputs, random D: a^T C a, largest for components."""
    x = rows()
    x = x - x.mean(0)
    gain = lambda a: np.trace(a.T @ x.T @ x @ a)
    best = gain(np.asarray(made(W, components(x), init="eva")[0].a, np.float64))
    for seed in range(20):
        drawn = np.asarray(programs.normal(seed, 12, 3), np.float64)
        assert gain(np.linalg.qr(drawn)[0]) < best


def stats_of(shares, size=8):
    """Statistics whose components explain the given shares."""
    s = jnp.sqrt(jnp.asarray(shares, jnp.float32))
    *batch, k = s.shape
    u = jnp.broadcast_to(jnp.eye(size)[:, :k], (*batch, size, k))
    return ActivationStats(u, s, jnp.ones(batch), jnp.ones(batch))


EVA = functools.partial(lorax.Target, rank=2, alpha=4, init="eva")
THREE = {name: programs.normal(i, 8, 8) for i, name in enumerate("uvw")}
SHARES = {
    "u": stats_of([0.5, 0.3, 0.1, 0.05]),
    "v": stats_of([0.9, 0.02, 0.01, 0.01]),
    "w": stats_of([0.4, 0.25, 0.2, 0.12]),
}


def test_ranks_go_where_components_explain_most():
    """The best 6: v 0.9, u 0.5, w 0.4, u 0.3, w 0.25, w 0.2."""
    found = eva.redistribute(THREE, EVA("[uvw]"), SHARES)
    assert {t.pattern: t.rank for t in found} == {"u": 2, "v": 1, "w": 3}
    assert {t.scale for t in found} == {2.0}
    stable = eva.redistribute(
        THREE, EVA("[uvw]", scaling="rank_stabilized"), SHARES, rho=1.5
    )
    assert {t.rank for t in stable} == {1, 2, 3}
    np.testing.assert_allclose([t.scale for t in stable], 4 / np.sqrt(2))
    adapters, _ = lorax.init(KEY, THREE, found, stats=SHARES)
    assert {path: a.rank for path, a in adapters.items()} == {"u": 2, "v": 1, "w": 3}
    same = eva.redistribute(THREE, EVA("[uvw]"), SHARES, rho=1)
    assert {t.rank for t in same} == {2}


def test_a_kernel_without_a_rank_is_left_to_no_other_target():
    shares = SHARES | {"v": stats_of([0.01, 0.01, 0.01, 0.01])}
    targets = [EVA("[vw]"), lorax.Target("[uv]", rank=1), lorax.Target("[vw]", rank=1)]
    found = eva.redistribute(THREE, targets, shares)
    adapters, _ = lorax.init(KEY, THREE, found, stats=shares)
    assert {path: a.rank for path, a in adapters.items()} == {"u": 1, "w": 4}
    assert len(found) == 2  # the last rule had nothing left before either


def test_a_stack_pays_for_all_of_its_layers():
    """Means 0.5 and 0.2, three each, before single kernels of 0.4 and 0.3."""
    stack = programs.normal(1, 3, 8, 8)
    fn = lambda params, x: jax.lax.scan(
        lambda x, w: (jnp.tanh(x @ w), None), x @ params["u"] @ params["v"], params["w"]
    )
    params = {"u": THREE["u"], "v": THREE["v"], "w": stack}
    kernels = lorax.discover(fn, params, jnp.ones((1, 8)))
    layers = np.array([[0.2, 0.1], [0.5, 0.2], [0.8, 0.3]])
    shares = {
        "u": stats_of([0.4, 0.1]),
        "v": stats_of([0.3, 0.25]),
        "w": stats_of(layers),
    }
    found = eva.redistribute(params, EVA("[uvw]", rank=1), shares, kernels)
    assert {t.pattern: t.rank for t in found} == {"u": 1, "v": 1, "w": 1}
    shares["w"] = stats_of(layers / 10)  # the remaining 1 of 5 buys no layer of three
    found = eva.redistribute(params, EVA("[uvw]", rank=1), shares, kernels)
    assert {t.pattern: t.rank for t in found} == {"u": 2, "v": 2}


def corda_part(w, c, rank, mode, damp=0.01):
    """The authors' code in float64, where w is [out, in]."""
    weight = np.asarray(w, np.float64).T
    c = c / np.mean(np.diag(c))
    c = c + damp * np.eye(len(c))
    u, s, vt = np.linalg.svd(weight @ c, full_matrices=False)
    v = vt @ np.linalg.inv(c)
    own = slice(None, rank) if mode == "instruction" else slice(-rank, None)
    root = np.sqrt(s[own])
    return (root[:, None] * v[own]).T, (u[:, own] * root).T


@pytest.mark.parametrize("shape", [(12, 9), (12, 20)])
@pytest.mark.parametrize("mode", ["instruction", "knowledge"])
def test_corda_is_the_authors_decomposition(mode, shape):
    kernel, x = programs.normal(1, *shape), rows()
    lora, rest = made(kernel, moments(x), init="corda", options={"mode": mode})
    a, b = corda_part(kernel, x.T @ x / len(x), 3, mode)
    np.testing.assert_allclose(2 * lora.a @ lora.b, a @ b, atol=1e-4)
    np.testing.assert_allclose(rest, kernel - a @ b, atol=1e-4)
    # the balance too: each triplet's share of a and b, by norms
    size = lambda v, axis: np.linalg.norm(v, axis=axis) / np.sqrt(2)
    np.testing.assert_allclose(np.linalg.norm(lora.a, axis=0), size(a, 0), rtol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(lora.b, axis=1), size(b, 1), rtol=2e-3)
    again, _ = made(
        kernel,
        Covariance(100 * moments(x).matrix, jnp.float32(1)),
        init="corda",
        options={"mode": mode},
    )
    np.testing.assert_allclose(again.a, lora.a, atol=1e-4, rtol=1e-3)


def test_what_is_moved_to_keep_knowledge_weighs_least_there():
    """Against random orthogonal projections onto 3 outputs, in the norm |C part|."""
    x = rows()
    c = x.T @ x / len(x)
    c = c / np.mean(np.diag(c)) + 0.01 * np.eye(12)
    w = np.asarray(W, np.float64)
    weight = lambda part: np.linalg.norm(c @ part)
    part = lambda mode: np.asarray(
        W - made(W, moments(x), init="corda", options={"mode": mode})[1], np.float64
    )
    least, most = weight(part("knowledge")), weight(part("instruction"))
    for seed in range(20):
        u, _ = np.linalg.qr(np.asarray(programs.normal(seed, 9, 3), np.float64))
        assert least < weight(w @ u @ u.T) < most


def test_no_inverse_no_error_where_the_inputs_are_few():
    """Ten rows of forty inputs, barely damped: a float32 inverse would be far off."""
    x = rows(10, 40, 2.0)
    kernel = programs.normal(1, 40, 30)
    options = {"damp": 1e-6, "mode": "instruction"}
    lora, _ = made(kernel, moments(x), init="corda", options=options)
    a, b = corda_part(kernel, x.T @ x / len(x), 3, "instruction", 1e-6)
    size = np.linalg.norm(a @ b)
    assert np.linalg.norm(2 * lora.a @ lora.b - a @ b) < 1e-4 * size
    c = moments(x).matrix
    c = c / jnp.mean(jnp.diag(c)) + 1e-6 * jnp.eye(40)
    u, s, vt = jnp.linalg.svd(c @ kernel, full_matrices=False)
    theirs = jnp.linalg.inv(c) @ (u[:, :3] * s[:3]) @ vt[:3]
    assert np.linalg.norm(theirs - a @ b) > 1e-2 * size


def test_experts_without_tokens_and_kernels_of_lower_rank():
    x = rows()
    kernel = programs.normal(1, 2, 12, 9)
    both = Covariance(
        jnp.stack([moments(x).matrix, jnp.zeros((12, 12))]), jnp.array([50.0, 0])
    )
    target = lorax.Target("w", rank=3, alpha=6, init="corda", batch_axes=(0,))
    adapters, _ = lorax.init(KEY, {"w": kernel}, target, stats={"w": both})
    lora = adapters["w"]
    u, s, vt = np.linalg.svd(np.asarray(kernel[1], np.float64), full_matrices=False)
    want = u[:, :3] * s[:3] @ vt[:3]  # as PiSSA: all possible inputs weigh the same
    np.testing.assert_allclose(2 * lora.a[1] @ lora.b[1], want, atol=1e-4)
    thin = W[:, :4] @ programs.normal(2, 4, 9)
    for kernel, zero in ((thin, 3), (jnp.zeros((12, 9)), 3)):
        options = {"mode": "knowledge"}
        lora, rest = made(kernel, moments(x), init="corda", options=options)
        np.testing.assert_allclose(np.linalg.norm(lora.a, axis=0), 1, rtol=1e-4)
        assert np.sum(np.abs(lora.b).max(1) == 0) == zero
        np.testing.assert_array_equal(rest, kernel)


def test_bad_input():
    x = rows()
    with pytest.raises(ValueError, match="w: init='eva' looks at data; pass stats"):
        made(W, init="eva")
    with pytest.raises(ValueError, match=re.escape("shape (12, 2), but this target")):
        made(W, components(x, 2), init="eva")
    with pytest.raises(ValueError, match=re.escape("needs (12, 12); calibrate with")):
        made(W, moments(x[:, :7]), init="corda")
    with pytest.raises(
        ValueError, match="w: mode='kpm'; choose one of instruction, kn"
    ):
        made(W, moments(x), init="corda", options={"mode": "kpm"})
    with pytest.raises(ValueError, match="w: damp=0; give a number > 0"):
        made(W, moments(x), init="corda", options={"damp": 0})
    with pytest.raises(
        ValueError, match="init='eva'.*no meaning for adapter='adalora'"
    ):
        made(W, components(x), init="eva", adapter="adalora")
    with pytest.raises(ValueError, match="rho=0.5; give a number >= 1"):
        eva.redistribute(THREE, EVA("u"), SHARES, rho=0.5)
    with pytest.raises(
        ValueError, match="u: rho=3 needs 6 components, but stats has 4"
    ):
        eva.redistribute(THREE, EVA("u"), SHARES, rho=3)
    with pytest.raises(ValueError, match="u: rho=2.0 needs 4 .* stats has no"):
        eva.redistribute(THREE, EVA("u"), {})
