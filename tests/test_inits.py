"""Every initialisation by its own equations; what all share is in test_protocols."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax.types import GradSketch
from tests import programs
from tests.test_linalg import captured, spectrum

KEY = jax.random.key(0)
AXES = lorax.Axes((0,), (1,))


def made(kernel, stats=None, **fields):
    """The adapter of one kernel, and the kernel after the init."""
    target = lorax.Target("w", **{"rank": 3, "alpha": 6, **fields})
    stats = None if stats is None else {"w": stats}
    adapters, params = lorax.init(KEY, {"w": kernel}, target, stats=stats)
    return adapters["w"], params["w"]


def exact(gradient, k=None):
    u, s, vt = np.linalg.svd(np.asarray(gradient, np.float64), full_matrices=False)
    k = len(s) if k is None else k
    parts = u[:, :k], s[:k], vt[:k]
    return GradSketch(*(jnp.asarray(part, jnp.float32) for part in parts))


def test_gaussian_keeps_activations_at_the_size_of_their_input():
    kernel = jnp.ones((400, 300))
    lora, after = made(kernel, rank=100, init="gaussian")
    assert after is kernel and not lora.b.any()
    np.testing.assert_allclose(np.std(lora.a), 1 / np.sqrt(400), rtol=0.02)
    lora, _ = made(kernel, rank=100, init="gaussian", options={"zero": "a"})
    assert not lora.a.any()
    np.testing.assert_allclose(np.std(lora.b), 1 / np.sqrt(100), rtol=0.02)
    with pytest.raises(ValueError, match="w: zero='c'; choose one of a, b"):
        made(kernel, init="gaussian", options={"zero": "c"})


@pytest.mark.parametrize("iterations", [None, 8])
def test_pissa_is_the_principal_part_in_balance(iterations):
    """a = U sqrt(S/s), b = sqrt(S/s) V^T: a^T a = b b^T, s a b the best rank-r part."""
    kernel, s = spectrum(12, 9, 1.0)
    lora, rest = made(kernel, init="pissa", options={"iterations": iterations})
    u, s, vt = np.linalg.svd(np.asarray(kernel, np.float64))
    best = u[:, :3] * s[:3] @ vt[:3]
    np.testing.assert_allclose(2 * lora.a @ lora.b, best, atol=1e-5)
    np.testing.assert_allclose(lora.a.T @ lora.a, np.diag(s[:3] / 2), atol=1e-5)
    np.testing.assert_allclose(lora.b @ lora.b.T, np.diag(s[:3] / 2), atol=1e-5)
    np.testing.assert_allclose(rest, kernel - best, atol=1e-5)


def test_pissa_of_adalora_starts_from_the_singular_values():
    kernel, s = spectrum(12, 9, 1.0)
    adapter, rest = made(kernel, init="pissa", adapter="adalora")
    np.testing.assert_allclose(adapter.lam, s[:3] / 2, rtol=1e-5)
    np.testing.assert_allclose(adapter.p.T @ adapter.p, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(adapter.q @ adapter.q.T, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(adapter.merge(rest), kernel, atol=1e-6)


def test_pissa_by_a_randomised_decomposition_captures_the_exact_energy():
    kernel, s = spectrum(96, 64, 0.5)
    lora, _ = made(kernel, rank=8, init="pissa", options={"iterations": 4})
    share = captured(kernel, np.linalg.qr(lora.a)[0])
    assert share >= 0.99 * np.sum(s[:8] ** 2) / np.sum(s**2)


@pytest.mark.parametrize("init,stats", [("pissa", False), ("lora_ga", True)])
def test_the_residual_is_taken_from_the_cast_factors(init, stats):
    """bf16 factors: the merged kernel is closer than with exact factors subtracted."""
    kernel = programs.normal(0, 48, 32)
    stats = exact(programs.normal(1, 48, 32)) if stats else None
    cast, rest = made(kernel, stats, init=init, dtype=jnp.bfloat16)
    whole, exact_rest = made(kernel, stats, init=init)
    error = lambda adapter, rest: np.linalg.norm(adapter.merge(rest) - kernel)
    size = np.linalg.norm(kernel)
    assert error(cast, rest) < 1e-6 * size < 1e-5 * size < error(cast, exact_rest)
    assert error(whole, exact_rest) < 1e-6 * size


def test_milora_is_the_minor_part_in_balance():
    kernel = programs.normal(0, 12, 9)
    lora, rest = made(kernel, init="milora")
    u, s, vt = np.linalg.svd(np.asarray(kernel, np.float64), full_matrices=False)
    least = u[:, -3:] * s[-3:] @ vt[-3:]
    np.testing.assert_allclose(2 * lora.a @ lora.b, least, atol=1e-5)
    np.testing.assert_allclose(lora.a.T @ lora.a, np.diag(s[-3:] / 2), atol=1e-5)
    np.testing.assert_allclose(lora.b @ lora.b.T, np.diag(s[-3:] / 2), atol=1e-5)
    np.testing.assert_allclose(rest, kernel - least, atol=1e-5)
    adapter, rest = made(kernel, init="milora", adapter="adalora")
    np.testing.assert_allclose(adapter.lam, s[-3:] / 2, rtol=1e-4)
    np.testing.assert_allclose(adapter.merge(rest), kernel, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 2, 7])
def test_milora_leaves_no_pair_dead(rank):
    """Where the kernel has fewer directions than the adapter, only b is zero."""
    thin = programs.normal(0, 12, rank) @ programs.normal(1, rank, 9)
    lora, rest = made(thin, init="milora")
    lost = min(9 - rank, 3)
    a, b = np.linalg.norm(lora.a, axis=0), np.linalg.norm(lora.b, axis=1)
    np.testing.assert_allclose(a[3 - lost :], 1, rtol=1e-4)
    np.testing.assert_array_equal(b[3 - lost :], 0)
    assert (b[: 3 - lost] > 0.1).all()
    np.testing.assert_allclose(lora.merge(rest), thin, atol=1e-6)


@pytest.mark.parametrize("std", [0.1, 0.5])
def test_orthogonal_factors_cancel_in_halves_of_the_rank(std):
    options = {} if std == 0.1 else {"std": std}
    kernel = jnp.ones((300, 200))
    lora, after = made(kernel, rank=8, init="orthogonal", options=options)
    assert after is kernel and lora.moved_by is None
    a, b = (np.asarray(x, np.float64) for x in (lora.a, lora.b))
    rank = lambda x: np.sum(np.linalg.svd(x)[1] > 1e-4 * std)
    assert rank(a) == rank(b) == 4
    assert np.abs(a @ b).max() < 1e-5 * std**2  # 8 roundings of entries of 4 std
    for x in (a, b):
        np.testing.assert_allclose(np.std(x), std / np.sqrt(2), rtol=0.1)
    with pytest.raises(
        ValueError, match="w: .*halves the rank, but rank=3; give an ev"
    ):
        made(kernel, rank=3, init="orthogonal")


def test_olora_is_orthonormal_on_the_output_side():
    kernel = programs.normal(0, 12, 9)
    lora, rest = made(kernel, init="olora")
    np.testing.assert_allclose(lora.b @ lora.b.T, np.eye(3), atol=1e-5)
    q, r = np.linalg.qr(np.asarray(kernel, np.float64).T)
    want = (q[:, :3] @ r[:3]).T
    np.testing.assert_allclose(lora.a @ lora.b, want, atol=1e-4)
    np.testing.assert_allclose(rest, kernel - 2 * want, atol=1e-4)


def test_olora_as_peft_has_it():
    torch = pytest.importorskip("torch", reason="needs the golden extra: torch, peft")
    peft = pytest.importorskip("peft", reason="needs the golden extra: torch, peft")
    kernel = programs.normal(0, 12, 9)
    layer = torch.nn.Linear(12, 9, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(np.array(kernel.T)))
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["0"], init_lora_weights="olora"
    )
    theirs = peft.get_peft_model(torch.nn.Sequential(layer), config).base_model.model[0]
    a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    lora, rest = made(kernel, init="olora")
    np.testing.assert_allclose(lora.a @ lora.b, (b @ a).detach().T, atol=1e-5)
    np.testing.assert_allclose(rest, theirs.base_layer.weight.detach().T, atol=1e-5)


def first_step(lora, gradient):
    """dW / -lr of one SGD step on both factors, to first order in lr, in float64."""
    a, b, g = (np.asarray(x, np.float64) for x in (lora.a, lora.b, gradient))
    return lora.scale**2 * (a @ a.T @ g + g @ b.T @ b)


def best(gradient, rank):
    u, s, vt = np.linalg.svd(np.asarray(gradient, np.float64), full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank]


@pytest.mark.parametrize(
    "options,multiplier",
    [
        ({"scale": "gd"}, 1.0),
        ({"scale": "unit"}, 4.0),
        ({}, 4 * np.sqrt(32) / 16),
        ({"gamma": 64.0}, 4 * np.sqrt(32) / 64),
    ],
)
def test_the_first_step_of_lora_ga_is_the_best_of_rank_2r(options, multiplier):
    """It is (s c)^2 times that, with s = 2."""
    gradient = programs.normal(0, 48, 32)
    lora, _ = made(
        programs.normal(1, 48, 32), exact(gradient, 8), init="lora_ga", options=options
    )
    want = multiplier * best(gradient, 6)
    got = first_step(lora, gradient)
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


def test_a_real_step_of_sgd_on_both_factors_is_that_step():
    """Full-batch, through adapt: W moves by -lr (s c)^2 times that, up to lr^2."""
    gradient, kernel = programs.normal(0, 16, 12), programs.normal(1, 16, 12)
    lora, rest = made(kernel, exact(gradient), init="lora_ga", options={"scale": "gd"})
    loss = lorax.adapt(lambda params, g: jnp.sum(params["w"] * g))
    with pytest.warns(lorax.MergeWarning):  # the kernel meets an elementwise product
        grads = jax.grad(loss)({"w": lora}, {"w": rest}, gradient)["w"]
    lr = 1e-4
    moved = lora.replace(a=lora.a - lr * grads.a, b=lora.b - lr * grads.b)
    wide = lambda ad: np.asarray(ad.a, np.float64) @ np.asarray(ad.b, np.float64)
    step = 2 * (wide(moved) - wide(lora))
    want = -lr * best(gradient, 6)
    assert np.linalg.norm(step - want) <= 2e-3 * np.linalg.norm(want)


def test_lora_ga_clips_a_product_that_outgrows_the_kernel():
    kernel = programs.normal(1, 16, 12) / 100
    stats = exact(programs.normal(0, 16, 12))
    free, _ = made(kernel, stats, init="lora_ga")
    lora, _ = made(kernel, stats, init="lora_ga", options={"norm_clip": True})
    size = lambda lora: np.abs(2 * lora.a @ lora.b).max()
    assert size(free) > 2 * np.abs(kernel).max()
    np.testing.assert_allclose(size(lora), np.abs(kernel).max(), rtol=1e-5)


def test_lora_one_has_moved_down_the_gradient():
    """s a b = -s g / S_1 times the best rank-r part; the kernel is unchanged."""
    gradient, kernel = programs.normal(0, 16, 12), programs.normal(1, 16, 12)
    lora, after = made(kernel, exact(gradient), init="lora_one")
    assert after is kernel
    first = np.linalg.norm(gradient, 2)
    want = -best(gradient, 3) / 128 / first
    np.testing.assert_allclose(lora.a @ lora.b, want, atol=1e-7)
    zero, _ = made(kernel, exact(jnp.zeros((16, 12))), init="lora_one")
    assert np.isfinite(zero.a).all() and not zero.a.any()


def test_bad_input():
    with pytest.raises(ValueError, match="init 'mine': stats='weights'; choose one of"):
        lorax.inits.register("mine", lambda *_: None, stats="weights")
    kernel, stats = programs.normal(0, 8, 6), exact(programs.normal(1, 8, 6))
    with pytest.raises(ValueError, match="w: init='lora_ga' looks at data.*calibrate"):
        made(kernel, init="lora_ga")
    with pytest.raises(ValueError, match="2 x rank = 8 .*in, out. = 6; lower the rank"):
        made(kernel, stats, init="lora_ga", rank=4)
    with pytest.raises(ValueError, match="scale='rs'; choose one of stable, gd, unit"):
        made(kernel, stats, init="lora_ga", options={"scale": "rs"})
    with pytest.raises(ValueError, match="calibrate with the targets"):
        made(programs.normal(0, 7, 6), stats, init="lora_ga")
    with pytest.raises(ValueError, match="no meaning for adapter='adalora'"):
        made(kernel, stats, init="lora_ga", adapter="adalora")


@pytest.mark.parametrize("init", ["pissa", "olora", "lora_ga", "milora"])
def test_a_subset_of_a_stack_moves_only_its_layers(init):
    kernel = programs.normal(0, 3, 8, 6)
    fn = lambda params, x: jax.lax.scan(
        lambda x, w: (x @ w @ w.T, None), x, params["w"]
    )
    kernels = lorax.discover(fn, {"w": kernel}, jnp.ones((1, 8)))
    target = lorax.Target("w", rank=2, init=init, layers=(0, 2))
    stats = jax.tree.map(
        lambda *parts: jnp.stack(parts),
        *(exact(programs.normal(i, 8, 6), 4) for i in (1, 2)),
    )
    make = functools.partial(lorax.init, KEY, {"w": kernel}, target, kernels)
    adapters, after = make(stats={"w": stats})
    np.testing.assert_array_equal(after["w"][1], kernel[1])
    assert np.abs(after["w"] - kernel)[jnp.array([0, 2])].max() > 0.01
    merged = lorax.merge(adapters, after)["w"]
    np.testing.assert_allclose(merged, kernel, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora", "lora_ga", "milora"])
def test_to_lora_brings_a_moved_start_back_to_the_original_base(init):
    """Rank 2r, the same scale, and the same trained kernel on the given base."""
    kernel = programs.normal(0, 16, 12)
    gradient = exact(programs.normal(1, 16, 12))
    first, rest = made(kernel, gradient if init == "lora_ga" else None, init=init)
    trained = programs.perturbed(first)
    plain = lorax.compose.to_lora({"w": trained}, {"w": first})["w"]
    assert plain.rank == 6 and plain.scale == first.scale
    np.testing.assert_allclose(plain.merge(kernel), trained.merge(rest), atol=1e-5)
