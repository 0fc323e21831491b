"""LoRA-Pro against dense least squares in float64; its gauge, start and damping."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorax import optim
from lorax.adapters import Lora
from lorax.types import PairStatics
from tests.optim import problems

N, M, R, S = 7, 5, 2, 1.5
CHOICES = ("sylvester", "symmetry", "zero")


class Case:
    """A kernel's gradient and two factors, with the factors' own gradients."""

    def __init__(self, seed=0, b=1.0, rank=R, shape=(N, M)):
        draw = np.random.default_rng(seed).normal
        self.a, self.b = draw(size=(shape[0], rank)), b * draw(size=(rank, shape[1]))
        self.g = draw(size=shape)
        self.ga, self.gb = S * self.g @ self.b.T, S * self.a.T @ self.g

    def trees(self, dtype):
        make = lambda a, b: {
            "w": Lora(jnp.asarray(a, dtype), jnp.asarray(b, dtype), S, problems.DENSE)
        }
        return make(self.ga, self.gb), make(self.a, self.b)

    def project(self, dtype=jnp.float64, **options):
        """hA and hB in numpy's float64."""
        with jax.enable_x64(dtype == jnp.float64):
            grads, adapters = self.trees(dtype)
            tx = optim.scale_by_lora_pro(**options)
            h = tx.update(grads, tx.init(adapters), adapters)[0]["w"]
            assert h.a.dtype == h.b.dtype == dtype
            return np.asarray(h.a, np.float64), np.asarray(h.b, np.float64)

    def induced(self, ha, hb):
        """The kernel's resulting movement."""
        return S * (ha @ self.b + self.a @ hb)

    def nearest(self):
        """The movement closest to g: least squares over every entry of hA and hB."""
        n, m = self.g.shape
        columns = np.hstack(
            [np.kron(np.eye(n), self.b.T), np.kron(self.a, np.eye(m))]
        )  # vec(hA B) and vec(A hB), rows first
        solution = np.linalg.lstsq(S * columns, self.g.ravel(), rcond=None)[0]
        return (S * columns @ solution).reshape(n, m)


@pytest.mark.parametrize("x", CHOICES)
@pytest.mark.parametrize("shape", [(N, M), (M, N), (3, 2)])
def test_the_induced_gradient_is_the_closest_one(x, shape):
    case = Case(shape=shape)
    best = case.nearest()
    h = case.project(x=x, damping=0.0)
    np.testing.assert_allclose(case.induced(*h), best, atol=1e-9)
    h = case.project(jnp.float32, x=x, damping=0.0)
    np.testing.assert_allclose(case.induced(*h), best, atol=1e-4)


def test_no_small_perturbation_brings_it_closer():
    case, rng = Case(1), np.random.default_rng(2)
    ha, hb = case.project(damping=0.0)
    distance = lambda *h: np.linalg.norm(case.induced(*h) - case.g)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(20):
            da, db = rng.normal(size=ha.shape), rng.normal(size=hb.shape)
            moved = distance(ha + size * da, hb + size * db)
            assert moved > distance(ha, hb) - 1e-12


def test_it_descends_and_the_inner_product_is_the_squared_norm():
    case = Case(3)
    ha, hb = case.project(damping=0.0)
    inner = np.sum(case.ga * ha) + np.sum(case.gb * hb)
    np.testing.assert_allclose(inner, np.sum(case.nearest() ** 2), rtol=1e-9)


def gauge(case, x):
    """X, recovered from hA: A^+ (hA - gA M^-1 / s^2)."""
    ha, _ = case.project(x=x, damping=0.0)
    own = case.ga @ np.linalg.inv(case.b @ case.b.T) / S**2
    return np.linalg.pinv(case.a) @ (ha - own)


def test_sylvester_residual():
    case = Case(4)
    n, m = case.a.T @ case.a, case.b @ case.b.T
    x = gauge(case, "sylvester")
    right = -case.a.T @ case.ga @ np.linalg.inv(m) / S**2
    np.testing.assert_allclose(n @ x + x @ m, right, atol=1e-9)
    np.testing.assert_allclose(gauge(case, "zero"), 0, atol=1e-9)
    symmetric = -np.linalg.inv(n) @ case.a.T @ case.ga @ np.linalg.inv(m) / (2 * S**2)
    np.testing.assert_allclose(gauge(case, "symmetry"), symmetric, atol=1e-9)


@pytest.mark.parametrize("x", ["sylvester", "symmetry"])
def test_x_minimises_what_it_is_named_for(x):
    """No r x r matrix added to it does better."""
    case, rng = Case(5), np.random.default_rng(6)
    ha, hb = case.project(x=x, damping=0.0)

    def objective(shift):
        a, b = ha + case.a @ shift, hb - shift @ case.b
        if x == "symmetry":
            return np.sum((a @ case.b - case.a @ b) ** 2)
        return np.sum((a - case.ga) ** 2) + np.sum((b - case.gb) ** 2)

    for _ in range(30):
        assert objective(0.01 * rng.normal(size=(R, R))) > objective(np.zeros((R, R)))


@pytest.mark.parametrize("relative", [True, False])
def test_damped_form_by_solves(relative):
    case = Case(7)
    n, m = case.a.T @ case.a, case.b @ case.b.T
    d = 0.1 * max(np.trace(n), np.trace(m)) / R if relative else 0.1
    n, m = np.linalg.inv(n + d * np.eye(R)), np.linalg.inv(m + d * np.eye(R))
    ha, hb = case.project(x="zero", damping=0.1, relative=relative)
    np.testing.assert_allclose(ha, case.ga @ m / S**2, atol=1e-9)
    outside = case.gb - case.a.T @ case.ga @ m @ case.b
    np.testing.assert_allclose(hb, n @ outside / S**2, atol=1e-9)


@pytest.mark.parametrize("x", CHOICES)
@pytest.mark.parametrize("damping", [0.0, 1e-6, 0.1])
def test_at_the_start_it_is_the_pseudo_inverse(x, damping):
    """B = 0: hA = 0 and hB = N^-1 gB / s^2 with damped N; mirrored for an embedding."""
    case = Case(8, b=0.0)
    ha, hb = case.project(jnp.float32, x=x, damping=damping)
    n = case.a.T @ case.a
    n += damping * np.trace(n) / R * np.eye(R)
    assert not ha.any()
    np.testing.assert_allclose(hb, np.linalg.inv(n) @ case.gb / S**2, rtol=1e-4)
    dead = Case(8, b=0.0)
    dead.a, dead.gb = 0 * dead.a, 0 * dead.gb
    assert not any(h.any() for h in dead.project(jnp.float32, x=x, damping=damping))


def second_step(lr, damping):
    """|lr hA| / |A| of SGD's second step, with a new gradient, from B = 0."""
    case = Case(9, b=0.0)
    _, hb = case.project(jnp.float32, damping=damping)
    case.b = -lr * hb
    case.g = np.random.default_rng(10).normal(size=case.g.shape)
    case.ga, case.gb = S * case.g @ case.b.T, S * case.a.T @ case.g
    ha, _ = case.project(jnp.float32, damping=damping)
    return lr * np.linalg.norm(ha) / np.linalg.norm(case.a)


def test_damping_bounds_the_second_step():
    """It shrinks with lr^2; undamped, it replaces A at every learning rate."""
    rates = (1e-1, 1e-2, 1e-3, 1e-4)
    steps = [second_step(lr, 0.1) for lr in rates]
    assert all(step <= lr for step, lr in zip(steps, rates)), steps
    wild = [second_step(lr, 0.0) for lr in rates]
    assert min(wild) > 0.1, wild


def test_the_gradients_change_once_b_is_not_zero():
    case = Case(11)
    ha, hb = case.project(jnp.float32)
    for g, h in ((case.ga, ha), (case.gb, hb)):
        cosine = np.sum(g * h) / np.linalg.norm(g) / np.linalg.norm(h)
        assert np.linalg.norm(g - h) > 0.1 * np.linalg.norm(g) and cosine < 0.999


@pytest.mark.parametrize("leaf", problems.LEAVES)
@pytest.mark.parametrize("make", [problems.lora, problems.dora])
def test_every_layout_is_a_stack_of_matrices(leaf, make):
    adapters = {"w": make(leaf), "bias": problems.full()}
    grads = problems.like(adapters)
    tx = optim.scale_by_lora_pro(x="zero", damping=0.0)
    updates, _ = tx.update(grads, tx.init(adapters), adapters)
    axes, rank = adapters["w"].axes, adapters["w"].rank
    layers = int(np.prod(adapters["w"].a.shape[: len(axes.batch)]))
    matrices = lambda f, *shape: np.asarray(f, np.float64).reshape(layers, *shape)
    for i in range(layers):
        g, b, h = (t["w"] for t in (grads, adapters, updates))
        ga, ha = (matrices(f.a, -1, rank)[i] for f in (g, h))
        b = matrices(b.b, rank, -1)[i]
        np.testing.assert_allclose(ha, ga @ np.linalg.inv(b @ b.T) / S**2, rtol=2e-3)
    np.testing.assert_array_equal(updates["bias"].value, grads["bias"].value)
    if make is problems.dora:
        np.testing.assert_array_equal(updates["w"].magnitude, grads["w"].magnitude)


def padded(tree, rank):
    """The adapters with factors widened by zeros."""
    lora = tree["w"]
    more = rank - lora.rank
    a = jnp.pad(lora.a, ((0, 0), (0, more)))
    return {"w": lora.replace(a=a, b=jnp.pad(lora.b, ((0, more), (0, 0))))}


@pytest.mark.parametrize("mode", ["sgd", "rowcol", "full"])
@pytest.mark.parametrize("b", [0.0, 1.0])
def test_a_padded_member_moves_as_it_would_alone(mode, b):
    """With its own scale and rank traced, and the padding exactly zero."""
    grads, adapters = Case(12, b=b).trees(jnp.float32)
    tx = optim.lora_pro(0.1, mode)
    alone = tx.update(grads, tx.init(adapters), adapters)[0]["w"]
    grads, adapters = padded(grads, 5), padded(adapters, 5)
    other = lambda tree: {"w": tree["w"].replace(scale=9.0)}

    @jax.jit
    def update(scale, rank):
        pairs = {"w": PairStatics(scale, rank)}
        given = other(adapters)
        return tx.update(other(grads), tx.init(given), given, pairs=pairs)[0]["w"]

    wide = update(jnp.float32(S), jnp.int32(R))
    np.testing.assert_allclose(wide.a[:, :R], alone.a, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(wide.b[:R], alone.b, rtol=1e-3, atol=1e-5)
    assert not np.any(wide.a[:, R:]) and not np.any(wide.b[R:])


# The moments


def run(tx, steps, dtype=jnp.float64, seed=13):
    """The last step's updates and the case, after some steps with fresh gradients."""
    case = Case(seed)
    with jax.enable_x64(dtype == jnp.float64):
        state = tx.init(case.trees(dtype)[1])
        history = []
        for step in range(steps):
            case.g = np.random.default_rng(step).normal(size=case.g.shape)
            case.ga, case.gb = S * case.g @ case.b.T, S * case.a.T @ case.g
            history.append(case.nearest())
            grads, adapters = case.trees(dtype)
            updates, state = tx.update(grads, state, adapters)
        h = updates["w"]
        return case, history, np.asarray(h.a, float), np.asarray(h.b, float)


def onto_tangent(case, u):
    own, case.g = case.g, u
    best, case.g = case.nearest(), own
    return best


def test_full_is_adam_on_the_projection_projected_again():
    tx = optim.lora_pro(0.5, "full", damping=0.0, b1=0.8, b2=0.9, eps=1e-6)
    case, history, ha, hb = run(tx, 3)
    mu = nu = 0.0
    for g in history:
        mu, nu = 0.8 * mu + 0.2 * g, 0.9 * nu + 0.1 * g**2
    u = (mu / (1 - 0.8**3)) / (np.sqrt(nu / (1 - 0.9**3)) + 1e-6)
    want = -0.5 * onto_tangent(case, u)
    np.testing.assert_allclose(case.induced(ha, hb), want, atol=1e-7)


def test_rowcol_is_adafactor_on_the_projection_projected_again():
    tx = optim.lora_pro(0.5, "rowcol", damping=0.0, b2=0.9, eps=1e-6)
    case, history, ha, hb = run(tx, 3)
    p = q = 0.0
    for g in history:
        p, q = 0.9 * p + 0.1 * np.mean(g**2, 1), 0.9 * q + 0.1 * np.mean(g**2, 0)
    p, q = p / (1 - 0.9**3), q / (1 - 0.9**3)
    u = history[-1] / np.sqrt(np.outer(p, q) / p.mean())
    want = -0.5 * onto_tangent(case, u)
    np.testing.assert_allclose(case.induced(ha, hb), want, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "follows"),
    [({}, "adafactor"), ({"mode": "full"}, "adam"), ({"mode": "factor"}, None)],
    ids=["default", "full", "factor"],
)
def test_what_each_mode_follows_with_its_own_damping(options, follows):
    """The cosine of the kernel's step with the projection of full fine-tuning's."""
    for seed in (13, 14, 15):
        case, history, ha, hb = run(
            optim.lora_pro(1.0, b2=0.9, **options), 8, seed=seed
        )
        mu = nu = p = q = 0.0
        for g in history:
            mu, nu = 0.9 * mu + 0.1 * g, 0.9 * nu + 0.1 * g**2
            p, q = 0.9 * p + 0.1 * np.mean(g**2, 1), 0.9 * q + 0.1 * np.mean(g**2, 0)
        steps = {
            "adam": mu / np.sqrt(nu),
            "adafactor": history[-1] / np.sqrt(np.outer(p, q)),
        }
        for name, step in steps.items():
            goal, own = onto_tangent(case, step), -case.induced(ha, hb)
            cosine = np.sum(goal * own) / np.linalg.norm(goal) / np.linalg.norm(own)
            assert (cosine > 0.999) == (name == follows), (seed, name, cosine)
            assert name == follows or cosine < 0.97, (seed, name, cosine)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({}, {"mode": "rowcol", "damping": 0.01}),
        ({"mode": "factor"}, {"mode": "factor", "damping": 0.1}),
        ({"mode": "sgd"}, {"mode": "sgd", "damping": 0.01}),
        ({"mode": "full"}, {"mode": "full", "damping": 0.01}),
    ],
    ids=["none", "factor", "sgd", "full"],
)
def test_the_defaults_are_these(given, meant):
    ours, theirs = (run(optim.lora_pro(0.1, **own), 2)[2:] for own in (given, meant))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    heavy = run(optim.lora_pro(0.1, **{**meant, "damping": 0.03}), 2)[2]
    assert np.any(heavy != ours[0])  # the damping matters


def largest(jaxpr):
    """The size of the largest array anywhere in a jaxpr."""
    inner = [
        largest(getattr(p, "jaxpr", p))
        for eqn in jaxpr.eqns
        for p in eqn.params.values()
        if hasattr(getattr(p, "jaxpr", p), "eqns")
    ]
    own = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
    return max(own + inner)


@pytest.mark.parametrize("mode", ["sgd", "factor", "rowcol", "full"])
def test_state_is_as_small_as_promised_and_no_kernel_is_formed(mode):
    n, m, r = 40, 30, 2
    grads, adapters = Case(rank=r, shape=(n, m)).trees(jnp.float32)
    tx = optim.lora_pro(1e-3, mode)
    state = jax.eval_shape(tx.init, adapters)
    floats = sum(v.size for v in jax.tree.leaves(state) if v.dtype == jnp.float32)
    want = {"sgd": 0, "factor": 2 * r * (n + m), "rowcol": n + m, "full": 2 * n * m}
    assert floats == want[mode]
    jaxpr = jax.make_jaxpr(tx.update)(grads, tx.init(adapters), adapters)
    biggest = largest(jaxpr.jaxpr)
    assert (biggest >= n * m) == (mode == "full"), biggest
    assert mode == "full" or biggest <= 2 * r * n


def test_momentum_of_rowcol_is_of_the_factors():
    plain = optim.lora_pro(1.0, "rowcol")
    heavy = optim.lora_pro(1.0, "rowcol", b1=0.9)
    one, two = (run(tx, 1, jnp.float32)[2] for tx in (plain, heavy))
    np.testing.assert_allclose(one, two, rtol=1e-5)  # bias-corrected
    state = heavy.init(Case().trees(jnp.float32)[1])
    size = sum(v.size for v in jax.tree.leaves(state) if v.dtype == jnp.float32)
    assert size == N + M + R * (N + M)


def test_other_leaves_follow_adam():
    adapters = {"w": problems.dora(), "bias": problems.full()}
    grads = problems.like(adapters)
    for mode in ("factor", "rowcol", "full"):
        tx = optim.lora_pro(0.1, mode, eps=1e-12)
        updates, _ = tx.update(grads, tx.init(adapters), adapters)
        for u, g in (
            (updates["w"].magnitude, grads["w"].magnitude),
            (updates["bias"].value, grads["bias"].value),
        ):
            np.testing.assert_allclose(u, -0.1 * np.sign(g), rtol=1e-4)


def test_raw_gradients_are_clipped_before_it():
    grads, adapters = Case(14).trees(jnp.float32)
    tx = optax.chain(optax.clip_by_global_norm(1e-3), optim.lora_pro(1.0, "sgd"))
    clipped, _ = tx.update(grads, tx.init(adapters), adapters)
    own = optim.lora_pro(1.0, "sgd")
    whole, _ = own.update(grads, own.init(adapters), adapters)
    ratio = 1e-3 / float(optax.tree.norm(grads))
    np.testing.assert_allclose(clipped["w"].a, ratio * whole["w"].a, rtol=1e-4)


def test_errors():
    with pytest.raises(ValueError, match="x='qr'; choose one of sylvester, symmetry"):
        optim.scale_by_lora_pro(x="qr")
    with pytest.raises(ValueError, match="mode='adam'; choose one of rowcol, fac"):
        optim.lora_pro(1e-3, "adam")
    for make in (
        optim.scale_by_lora_pro,
        optim.scale_by_lora_pro_rowcol,
        optim.scale_by_lora_pro_full,
        functools.partial(optim.lora_pro, 1e-3),
    ):
        with pytest.raises(ValueError, match="damping=-0.1; give a number of at least"):
            make(damping=-0.1)
        with pytest.raises(ValueError, match="head: .* the p, lam, q of AdaLora"):
            make().init({"head": problems.adalora()})
