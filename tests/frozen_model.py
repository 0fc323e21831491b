"""A model of two kernels and a bias, by the method of `tests/plugin`.

Its frozen arrays are random signs, shared by kernels with the same input size, and the
column norms of every kernel.
"""

import jax
import jax.numpy as jnp
import numpy as np

import lorax
from tests import programs
from tests.plugin import methods

assert methods.Walsh  # importing it registers it

KEY = jax.random.key(0)
IN, HIDDEN, OUT = 8, 8, 16
X = programs.normal(9, 4, IN)
TARGETS = [
    lorax.Target("up|down", adapter="walsh", alpha=3),
    lorax.Target("bias", adapter="full"),
]
SIGNS, NORMS = "walsh/8", "up/norms"


def fn(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"] + params["bias"]


def loss_fn(params, x):
    return jnp.sum(fn(params, x) ** 2)


def plain():
    return {
        "up": programs.normal(1, IN, HIDDEN) / 2,
        "down": programs.normal(2, HIDDEN, OUT) / 2,
        "bias": programs.normal(3, OUT),
    }


def started(key=KEY, params=None):
    return lorax.init(key, plain() if params is None else params, TARGETS)


def trained():
    adapters, base = started()
    return programs.perturbed(adapters, 0.3), base


def hadamard(size):
    made = np.ones((1, 1))
    while len(made) < size:
        made = np.kron(made, [[1, 1], [1, -1]])
    return made


def by_hand(adapters, base, path):
    """The merged kernel, in float64: W + scale diag(s) H diag(w) H / N diag(n)."""
    wide = lambda x: np.asarray(x, np.float64)
    kernel, adapter = wide(base.params[path]), adapters[path]
    signs, norms = (wide(base.frozen[name]) for _, name in adapter.lent)
    weights, (n, m) = wide(adapter.weights), kernel.shape
    turn = hadamard(weights.size)
    update = turn @ np.diag(weights) @ turn / weights.size
    return kernel + adapter.scale * signs[:, None] * update[:n, :m] * norms


def same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(x, y)
