"""The cost of chunked cross-entropy: products, memory, transfers between devices."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorax
from experiments.planning import traffic
from lorax import analysis, losses, sharding
from tests import programs
from tests.programs import normal
from tests.test_cross_entropy import close


@pytest.mark.parametrize("devices", [1, 8])
def test_logits_are_made_once_and_a_chunk_at_a_time(devices):
    """Two products with a frozen head, forward and backward; no large temporaries."""
    tokens, width, words, chunk = 512, 16, 4096, 32
    hidden, kernel = normal(0, 1, tokens, width), normal(1, width, words)
    targets = jnp.zeros((1, tokens), int)

    def loss(hidden, kernel):
        return losses.chunked_cross_entropy(hidden, kernel, targets, chunk=chunk).mean

    step = jax.jit(jax.value_and_grad(loss))
    mesh = sharding.make_mesh(fsdp=-1, devices=jax.devices()[:devices])
    with jax.set_mesh(mesh) if devices > 1 else contextlib.nullcontext():
        traced = step.trace(hidden, kernel)
        assert analysis.operations(traced.jaxpr) == 2 * 2 * tokens * width * words
        held = traced.lower().compile().memory_analysis().temp_size_in_bytes
    assert held < 4 * tokens * words / 4  # a quarter of the logits


def compiled(step, mesh, *args):
    with jax.set_mesh(mesh):
        return jax.jit(step).lower(*args).compile()


def test_eight_devices_gather_a_head_once_and_agree_with_one():
    """On a mixed mesh: width sharded by fsdp, vocabulary by tensor."""
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    hidden, kernel = normal(0, 8, 16, 32), normal(1, 32, 64)
    targets = jnp.asarray(np.random.default_rng(0).integers(0, 64, (8, 16)))

    def loss(hidden, kernel):
        found = losses.chunked_cross_entropy(hidden, kernel, targets, chunk=2)
        return found.mean

    step = jax.value_and_grad(loss)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    cut = put(hidden, ("data", "fsdp")), put(kernel, "fsdp", "tensor")
    run = compiled(step, mesh, *cut)
    close(run(*cut), step(hidden, kernel))
    with jax.enable_x64(True):
        wide = [np.asarray(x, np.float64) for x in (hidden, kernel)]
        cut_wide = put(wide[0], ("data", "fsdp")), put(wide[1], "fsdp", "tensor")
        close(compiled(step, mesh, *cut_wide)(*cut_wide), step(*wide), 1e-13)
    moved = traffic.read(run.as_text()).collectives
    gathered = [x for x in moved if x.kind == "all-gather"]
    assert sum(x.times * x.nbytes for x in gathered) == 32 * 32 * 4, moved
    assert all(x.nbytes < 32 * 32 * 4 for x in moved if x not in gathered), moved


def test_explicit_meshes_agree_with_one_device():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    hidden, kernel = normal(0, 8, 12, 16), normal(1, 16, 32)
    targets = np.random.default_rng(0).integers(0, 32, (8, 12))

    def loss(params, hidden, targets):
        found = losses.chunked_cross_entropy(hidden, params["w"], targets, chunk=4)
        each = losses.token_log_probs(hidden, params["w"], targets, chunk=4)
        return found.mean + jnp.mean(each**2)

    kernels = lorax.discover(loss, {"w": kernel}, hidden, targets)
    target = lorax.Target("w", rank=2)
    made, _ = lorax.init(jax.random.key(0), {"w": kernel}, target, kernels)
    made = programs.perturbed(made)
    step = jax.value_and_grad(lorax.adapt(loss, on_merge="error"), argnums=(0, 2))
    want = step(made, {"w": kernel}, hidden, targets)
    with jax.set_mesh(mesh):
        put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
        rows = put(hidden, P("x")), put(targets, P("x"))
        close(jax.jit(step)(made, {"w": put(kernel, P("x", "y"))}, *rows), want)
