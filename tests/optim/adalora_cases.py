"""Shared by AdaLoRA's tests: small adapters, a short run, fast compilation."""

import jax
import numpy as np
import optax

import lorax
from tests import programs

AXES = lorax.Axes((0,), (1,))
STACK = lorax.Axes((1,), (2,), (0,))
RATE = 0.05

# 7 triplets down to 4: choices at 30, 40, ..., 140, then 60 steps of the last one
RUN = dict(target_budget=4, total_steps=200, initial_warmup=20, final_steps=60)

# 7 to 3 in eight steps: choices at 2, 4 and 5, three steps of the last one
SHORT = dict(
    target_budget=3, total_steps=8, initial_warmup=0, final_steps=3, interval=2
)


def drawn(seed, *batch, n=5, m=4, rank=3, scale=1.5, axes=AXES):
    p, lam, q = (
        programs.normal(seed, *batch, n, rank),
        programs.normal(seed + 1, *batch, rank),
        programs.normal(seed + 2, *batch, rank, m),
    )
    return lorax.AdaLora(0.5 * p, 0.1 * lam, 0.5 * q, scale, axes)


def two():
    """A matrix of rank 3 and a stack of two of rank 2."""
    return {"m": drawn(0), "s": drawn(3, 2, n=4, m=3, rank=2, scale=0.5, axes=STACK)}


def random_grads(adapters, seed):
    leaves, treedef = jax.tree.flatten(adapters)
    return treedef.unflatten(
        [programs.normal(100 * seed + i, *leaf.shape) for i, leaf in enumerate(leaves)]
    )


def compiled(fn, *args):
    """Compiles fast, for shapes this small."""
    return jax.jit(fn).lower(*args).compile({"xla_backend_optimization_level": 0})


def applied(tx, adapters, gradients):
    """The adapters and states after each of these gradients, with one compilation."""
    state, out = tx.init(adapters), []
    update = compiled(tx.update, adapters, state, adapters)
    for grads in gradients:
        updates, state = update(grads, state, adapters)
        adapters = optax.apply_updates(adapters, updates)
        out.append((adapters, state))
    return out


def assert_trees_close(got, want, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **{"rtol": 1e-6, **tolerance}),
        got,
        want,
    )


def released_budget(t, b0=144, bT=96, ti=500, tf=1500, T=3000):
    """The budget as github.com/QingruZhang/AdaLoRA computes it, in floats."""
    if t <= ti:
        return b0
    if t > T - tf:
        return bT
    return int(bT + (b0 - bT) * (1 - (t - ti) / (T - tf - ti)) ** 3)


def pull(x, form, gamma, matrices, update):
    """The slope that the form adds to the gradient, or subtracts after the update."""
    gram = x.T @ x - np.eye(x.shape[1])
    distance = np.sqrt((gram**2).sum())
    share = gamma * np.sqrt((update**2).sum() / (x**2).sum())
    return {
        "squared": gamma / matrices * 4 * x @ gram,
        "norm": gamma / matrices * x @ gram / distance,
        "decoupled": min(share, 1 / 8) * 4 * x @ gram / max(1, distance),
    }[form]
