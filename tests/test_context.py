"""Rows split over devices: a ring trains like one device, and what it sends.

In float64, in a child process, only rounding differs.
"""

import functools
import json
import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from experiments.planning import traffic
from lorax import attention, sharding
from lorax.attention import tiles
from tests import children

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


def in_float64(meshes):
    """What `tests.context_cases` prints for each mesh."""
    env = children.environment(devices=8, JAX_ENABLE_X64="1")
    command = [sys.executable, "-m", "tests.context_cases", meshes]
    done = subprocess.run(
        command, env=env, cwd=children.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(meshes.split(","))
    return rows


@pytest.mark.once
@pytest.mark.parametrize(
    "mesh",
    [
        "mixed",
        pytest.param("ring", marks=pytest.mark.slow),
        pytest.param("data", marks=pytest.mark.slow),
    ],
)
def test_a_ring_trains_as_one_device_in_float64(mesh, record_property):
    (row,) = in_float64(mesh)
    record_property("row", row)
    assert row["loss"] < 1e-12 and row["gradient"] < 1e-10, row
    assert row["adapters"] < 1e-9 and row["moved"] > 0.01, row
    assert row["bent"] > 1e-3, row  # segments and windows matter to the loss


def test_what_goes_round_the_ring():
    """Keys and values n - 1 times, twice; their gradients n + 1 times."""
    b, t, heads, kv, dim, n = 2, 128, 4, 2, 8, 8

    def loss(q, k, v):
        mixed = attention.attend(
            q, k, v, causal=True, implementation="tiles", striped=True
        )
        return (mixed**2).sum()

    shapes = [
        jax.ShapeDtypeStruct((b, t, m, dim), jnp.float32) for m in (heads, kv, kv)
    ]
    with jax.set_mesh(sharding.make_mesh(data=1, fsdp=1, context=n)):
        slope = jax.jit(jax.grad(loss, (0, 1, 2)))
        compiled = slope.lower(*shapes).compile()
    found = traffic.read(compiled.as_text()).bytes_by_kind()
    pair = 2 * b * (t // n) * kv * dim * 4
    assert found["collective-permute"] == (2 * (n - 1) + n + 1) * pair
    assert found.get("all-gather", 0) == 0


def test_a_recomputed_layer_holds_one_tile_of_scores_at_a_time(monkeypatch):
    """`jax.checkpoint` hoists what it can out of a loop, and would hoist all masks."""
    monkeypatch.setattr(tiles, "TILE", 4)

    def loss(x):
        tile = functools.partial(attention.attend, causal=True, implementation="tiles")
        layer = jax.checkpoint(lambda x, _: (x + tile(x, x, x), None))
        return jax.lax.scan(layer, x, length=3)[0].sum()

    x = jax.ShapeDtypeStruct((1, 128, 2, 8), jnp.float32)
    with jax.set_mesh(sharding.make_mesh(data=1, fsdp=1, context=4, tensor=2)):
        text = str(jax.make_jaxpr(jax.grad(loss))(x))
    masks = {
        math.prod(map(int, m.split(","))) for m in re.findall(r"bool\[([\d,]+)", text)
    }
    assert max(masks) == 4 * 4


def test_stripes_and_back():
    n, x = 4, jnp.arange(2 * 32).reshape(2, 32)
    with jax.set_mesh(sharding.make_mesh(data=1, fsdp=2, context=n)):
        striped = jax.jit(attention.stripe)(x)
        again = jax.jit(attention.unstripe)(striped)
    assert (again == x).all()
    want = x.reshape(2, 32 // n, n).swapaxes(1, 2).reshape(2, 32)
    assert (striped == want).all()
    assert (attention.stripe(x) == x).all()  # no mesh, no stripes


def test_what_a_ring_refuses():
    q = jnp.ones((1, 40, 2, 8))
    with jax.set_mesh(sharding.make_mesh(data=1, fsdp=2, context=4)):
        with pytest.raises(ValueError, match=r"40 tokens are not a multiple of 4\^2"):
            attention.stripe(q)
        with pytest.raises(ValueError, match="'lean' needs the tokens in their own"):
            attention.attend(q, q, q, implementation="lean", striped=True)
        with pytest.raises(ValueError, match="'tiles': it only supports causal"):
            attention.attend(q, q, q, implementation="tiles")
