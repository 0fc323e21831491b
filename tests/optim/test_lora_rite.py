"""LoRA-RITE against numpy float64 with bases by QR, and its claim: no gauge matters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorax import optim
from lorax.adapters import Lora
from tests.optim import problems

N, M, R, S = 9, 7, 3, 1.5


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def lora(a, b):
    return Lora(jnp.asarray(a), jnp.asarray(b), S, problems.DENSE)


def gradients(a, b, g):
    """Gradients of the factors, for a gradient of the kernel."""
    return lora(S * g @ b.T, S * a.T @ g)


class Reference:
    """One factor in the paper's algorithm; `dual` is the other one, transposed."""

    def __init__(self, b1, b2, eps, escape):
        self.b1, self.b2, self.eps, self.escape = b1, b2, eps, escape
        self.v, self.m, self.rho, self.basis, self.t = 0.0, 0.0, 0.0, None, 0

    def step(self, gradient, dual):
        self.t += 1
        basis, r = np.linalg.qr(dual)
        g = gradient @ np.linalg.inv(r)
        b1, b2 = (
            b * (1 - b ** (self.t - 1)) / (1 - b**self.t) for b in (self.b1, self.b2)
        )
        moved, m = 0.0, 0.0
        if self.basis is not None:
            p = basis.T @ self.basis
            moved, m = p @ self.v @ p.T, self.m @ p.T
            fall = np.linalg.eigvalsh(self.v) - np.linalg.eigvalsh(moved)
            self.rho = b2 * (self.rho + self.escape * fall.max())
        self.v = b2 * moved + (1 - b2) * g.T @ g / len(g)
        w, q = np.linalg.eigh(self.v)
        root = q @ np.diag(1 / (np.sqrt(w + self.rho) + self.eps)) @ q.T
        self.m = b1 * m + (1 - b1) * g @ root
        self.basis = basis
        return self.m @ np.linalg.inv(r).T


@pytest.mark.parametrize("escape", [True, False])
def test_steps_by_numpy(escape):
    """With factors that jump from step to step, so that much of V escapes."""
    draw = np.random.default_rng(0).normal
    b1, b2, eps = 0.8, 0.95, 1e-3
    tx = optim.scale_by_lora_rite(b1, b2, eps, escape)
    of_a, of_b = (Reference(b1, b2, eps, escape) for _ in "ab")
    state, update = None, jax.jit(tx.update)
    for _ in range(4):
        a, b, g = draw(size=(N, R)), draw(size=(R, M)), draw(size=(N, M))
        w, grads = {"w": lora(a, b)}, {"w": gradients(a, b, g)}
        state = tx.init(w) if state is None else state
        got, state = update(grads, state, w)
        want_a = of_a.step(S * g @ b.T, b.T)
        want_b = of_b.step(S * g.T @ a, a).T
        np.testing.assert_allclose(got["w"].a, want_a, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(got["w"].b, want_b, rtol=1e-8, atol=1e-10)
    assert of_a.rho > 0 if escape else of_a.rho == 0


GAUGES = {
    "orthogonal": np.linalg.qr(np.random.default_rng(1).normal(size=(R, R)))[0],
    "scale": 30 * np.eye(R),
    "general": np.random.default_rng(2).normal(size=(R, R)),
}


def products(tx, gauge):
    """The product after each of five steps towards a target."""
    draw = np.random.default_rng(3).normal
    target = draw(size=(N, M))
    a, b = draw(size=(N, R)) @ gauge, np.linalg.solve(gauge, draw(size=(R, M)))
    loss = lambda w: jnp.sum(jnp.tanh(w["w"].a @ w["w"].b - target) ** 2)

    @jax.jit
    def step(w, state):
        updates, state = tx.update(jax.grad(loss)(w), state, w)
        return optax.apply_updates(w, updates), state

    w, found = {"w": lora(a, b)}, []
    state = tx.init(w)
    for _ in range(5):
        w, state = step(w, state)
        found.append(np.asarray(w["w"].a @ w["w"].b))
    return np.array(found)


@pytest.mark.parametrize("gauge", GAUGES)
def test_the_path_of_the_product_does_not_depend_on_the_gauge(gauge):
    own = lambda g: products(optim.lora_rite(0.05, weight_decay=0.1), g)
    np.testing.assert_allclose(own(GAUGES[gauge]), own(np.eye(R)), rtol=1e-7, atol=1e-8)
    adam = lambda g: products(optax.adam(0.05), g)
    assert np.abs(adam(GAUGES[gauge]) - adam(np.eye(R))).max() > 0.05


def test_a_zero_factor_gives_the_other_no_step_and_the_next_step_is_finite():
    draw = np.random.default_rng(4).normal
    a, g = draw(size=(N, R)), draw(size=(N, M))
    w = {"w": lora(a, np.zeros((R, M)))}
    tx = optim.lora_rite(1e-3)
    updates, state = tx.update({"w": gradients(a, np.zeros((R, M)), g)}, tx.init(w), w)
    assert not updates["w"].a.any() and updates["w"].b.any()
    w = optax.apply_updates(w, updates)
    own = np.asarray(w["w"].a), np.asarray(w["w"].b)
    updates, _ = tx.update({"w": gradients(*own, g)}, state, w)
    moved = optax.apply_updates(w, updates)["w"]
    step = np.linalg.norm(moved.a @ moved.b - own[0] @ own[1])
    assert 0 < step < 10 * np.linalg.norm(own[0] @ own[1])


def test_where_it_stands_in_a_chain():
    from lorax import training

    w = {"w": lora(np.ones((N, R)), np.ones((R, M)))}
    for tx, name in (
        (
            optax.chain(optax.scale_by_adam(), optim.lora_rite(0.1)),
            "scale_by_lora_rite",
        ),
        (optax.chain(optim.lora_rite(0.1), optim.scale_by_gram()), "scale_by_gram"),
    ):
        with pytest.raises(ValueError, match=f"{name} comes after"):
            training.create_state(jax.random.key(0), w, tx)


def test_errors():
    with pytest.raises(ValueError, match="b2=1"):
        optim.lora_rite(0.1, b2=1.0)
    with pytest.raises(ValueError, match="eps=0; give a number > 0"):
        optim.scale_by_lora_rite(eps=0)
    with pytest.raises(ValueError, match="w: .*acts on pairs a and b"):
        optim.lora_rite(0.1).init({"w": problems.adalora()})
