"""Decompositions matrix by matrix: the same values and derivatives, and no hang."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax import _lapack

PLAIN = {
    "qr": lambda x: tuple(jnp.linalg.qr(x)),
    "svd": lambda x: tuple(jnp.linalg.svd(x, full_matrices=False)),
    "eigh": lambda x: tuple(jnp.linalg.eigh(x)),
}
REBUILT = {
    "qr": lambda q, r: q @ r,
    "svd": lambda u, s, vt: u * s[..., None, :] @ vt,
    "eigh": lambda w, v: v * w[..., None, :] @ np.swapaxes(v, -1, -2),
}


def stack(name, *shape, seed=0):
    x = np.random.default_rng(seed).normal(size=shape)
    x = x @ np.swapaxes(x, -1, -2) if name == "eigh" else x
    return jnp.asarray(x, jnp.float32)


@pytest.fixture(params=PLAIN)
def name(request):
    return request.param


@pytest.mark.parametrize("shape", [(5, 3), (4, 5, 3), (2, 3, 5, 4), (0, 5, 3)])
def test_the_parts_are_those_of_each_matrix(name, shape):
    x = stack(name, *shape)
    one = _lapack.one_by_one(PLAIN[name])
    found = jax.jit(one)(x)
    rebuilt = REBUILT[name](*map(np.asarray, found))
    np.testing.assert_allclose(rebuilt, x, atol=2e-5)
    jax.tree.map(lambda y, z: np.testing.assert_allclose(y, z, atol=1e-5),
                 getattr(_lapack, name)(x), found)  # fmt: skip


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="guards a CPU alone")
def test_vmap_adds_to_the_stack(name):
    one = _lapack.one_by_one(PLAIN[name])
    x = stack(name, 3, 2, 5, 4)
    expected = one(x)
    for mapped in (jax.vmap(one), jax.vmap(jax.vmap(one))):
        jax.tree.map(np.testing.assert_array_equal, jax.jit(mapped)(x), expected)
    across = jax.vmap(one, in_axes=1, out_axes=1)(x)
    jax.tree.map(np.testing.assert_array_equal, across, expected)
    program = jax.jit(jax.vmap(one)).lower(x).as_text()
    calls = [line for line in program.splitlines() if "stablehlo.custom_call" in line]
    assert calls and not [line for line in calls if "tensor<3x" in line]


def test_outside_of_a_program_a_shape_is_traced_once(name):
    traced = []

    def decompose(x):
        traced.append(x.shape)
        return PLAIN[name](x)

    one = _lapack.one_by_one(decompose)
    one(stack(name, 3, 5, 4))
    before = len(traced)
    one(stack(name, 3, 5, 4, seed=1))
    assert len(traced) == before > 0


def test_derivatives_are_those_of_jax(name):
    x, t = stack(name, 3, 5, 4), stack(name, 3, 5, 4, seed=1)
    one = _lapack.one_by_one(PLAIN[name])
    weight = [stack("qr", *part.shape, seed=2) for part in one(x)]

    def score(function):
        return lambda x: sum(
            jnp.vdot(w, y) for w, y in zip(weight, function(x), strict=True)
        )

    given, expected = (jax.jit(jax.grad(score(f)))(x) for f in (one, PLAIN[name]))
    np.testing.assert_allclose(given, expected, rtol=1e-3, atol=1e-3)
    given, expected = (jax.jvp(f, (x,), (t,))[1] for f in (one, PLAIN[name]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
        given, expected,
    )  # fmt: skip
    several = jnp.stack([x, 2 * x])
    found = jax.vmap(jax.grad(score(one)))(several)
    for own, member in zip(found, several, strict=True):
        alone = jax.grad(score(one))(member)
        np.testing.assert_allclose(own, alone, rtol=1e-3, atol=1e-3)


MANY = """
import os
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import jax, jax.numpy as jnp
from lorax import _lapack
xs = [jax.random.normal(jax.random.key(i), (10, 1024, 32)) for i in range(12)]
found = jax.jit(lambda xs: [_lapack.qr(x) for x in xs])(xs)
print(sum(float(jnp.abs(q.mT @ q - jnp.eye(32)).max()) for q, _ in found))
"""


def test_many_stacks_at_once_do_not_hang_on_two_cores():
    program = [sys.executable, "-c", MANY]
    done = subprocess.run(
        program, capture_output=True, text=True, timeout=120, check=True
    )
    assert float(done.stdout) < 1e-3
