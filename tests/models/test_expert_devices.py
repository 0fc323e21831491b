"""Experts split over devices: training matches one device, and what is sent.

In float64, in a child process, only rounding differs.
"""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from experiments.planning import traffic
from lorax import sharding
from lorax.models import experts
from tests import children

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


@pytest.mark.once
@pytest.mark.parametrize(
    "mesh",
    [
        "mixed",
        pytest.param("experts", marks=pytest.mark.slow),
        pytest.param("context", marks=pytest.mark.slow),
    ],
)
def test_shared_experts_train_as_on_one_device_in_float64(mesh, record_property):
    env = children.environment(devices=8, JAX_ENABLE_X64="1")
    command = [sys.executable, "-m", "tests.expert_cases", mesh]
    done = subprocess.run(
        command, env=env, cwd=children.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    record_property("rows", rows)
    assert [row["load"] for row in rows] == ["even", "uneven", "dense"]
    for row in rows:
        assert row["plain"] < 1e-13 and row["adapted"] < 1e-12, row
        assert row["moved"] > 0.01, row


@pytest.mark.parametrize("dispatch", [experts.ragged, experts.dense])
def test_tokens_go_round_and_no_kernel_does(dispatch):
    """What is sent: tokens and routes to all expert devices, and sums back."""
    count, width, hidden, rows, time = 8, 16, 24, 8, 4
    mesh = sharding.make_mesh(fsdp=1, expert=8)
    lies = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("expert"))

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=lies)

    def run(x, routes, gate_up, down):
        gate_up, down = experts.Linear(gate_up), experts.Linear(down)
        return dispatch(x, routes, gate_up, down, lambda g, u: jax.nn.silu(g) * u)

    given = (
        shape(rows, time, width),
        experts.Routes(shape(rows, time, 2, dtype=jnp.int32), shape(rows, time, 2)),
        shape(count, width, 2, hidden),
        shape(count, hidden, width),
    )
    with jax.set_mesh(mesh):
        text = jax.jit(run).lower(*given).compile().as_text()
    found = traffic.read(text).bytes_by_kind()
    assert found.pop("all-gather") == rows * time * (width + 2 + 2) * 4
    assert {*found} <= {"reduce-scatter", "all-reduce"}  # or with one tensor device
    assert {*found.values()} == {time * width * 4}
