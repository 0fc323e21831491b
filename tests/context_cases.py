"""A tiny Llama on packed rows, on one device and on meshes that split the rows.

    python -m tests.context_cases MESHES     with JAX_ENABLE_X64, in float64

prints as JSON how far each mesh is from one device.
"""

import contextlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lorax
from lorax import sharding, training
from lorax.attention import tiles
from lorax.models import layers, llama, table

MESHES = {
    "mixed": {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
    "ring": {"data": 1, "fsdp": 1, "context": 8, "tensor": 1},
    "data": {"data": 2, "fsdp": 1, "context": 4, "tensor": 1},
}
STEPS, ROWS, TIME = 3, 4, 64
SIZES = {
    "vocabulary": 32,
    "width": 32,
    "layers": 2,
    "heads": 8,
    "kv_heads": 2,
    "head_dim": 8,
    "hidden": 40,
    "windows": (20, 20),
}


def model_of(attention, windows=SIZES["windows"]):
    wide = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    sizes = SIZES | {"windows": windows}
    return llama.Model(llama.Config(**sizes, **wide, attention=attention))


def batch():
    """Rows of packed documents, the last of them padding."""
    rng = np.random.default_rng(0)
    ends = np.sort(rng.integers(1, TIME, (ROWS, 3)), axis=1)
    segments = (np.arange(TIME) >= ends[:, :, None]).sum(1)
    first = np.where(segments == 0, 0, np.take_along_axis(ends, segments - 1, 1))
    tokens = rng.integers(0, SIZES["vocabulary"], (ROWS, TIME + 1))
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": (segments < 3) * rng.random((ROWS, TIME)),
        "segments": segments,
        "positions": np.arange(TIME) - first,
    }


def loss_of(model):
    def loss_fn(params, batch):
        packed = {k: batch[k] for k in ("segments", "positions") if k in batch}
        logits = model.apply({"params": params}, batch["inputs"], **packed)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return (nll * batch["weights"]).sum() / batch["weights"].sum()

    return loss_fn


def run(mesh):
    """Losses, the first gradients of all parameters, and adapters before and after."""
    model = model_of("plain" if mesh is None else "flash")
    given = batch()
    params = jax.jit(model_of("plain").init)(jax.random.key(0), given["inputs"])
    params = jax.tree.map(lambda x: x * 5 if x.ndim > 2 else x, params["params"])
    loss_fn = loss_of(model)
    kernels = lorax.discover(loss_of(model_of("plain")), params, given)
    target = lorax.Target("all-linear", rank=4, dtype=jnp.float64)
    adapters, params = lorax.init(jax.random.key(1), params, target, kernels)
    tx = optax.adam(0.01, eps=1e-4)
    state = training.create_state(jax.random.key(2), adapters, tx)
    where, context = None, contextlib.nullcontext()
    if mesh is not None:
        config = model.config
        axes = table.logical_axes(llama.entries(config), config.stacks, config.scan)
        placed = sharding.place(params, mesh, axes)
        params = jax.device_put(params, placed.tree(params))
        where = sharding.state_shardings(state, placed), sharding.replicated(mesh)
        state = jax.device_put(state, where[0])
        given = jax.device_put(given, sharding.batch_sharding(mesh))
        context = jax.set_mesh(mesh)
    step = training.make_train_step(training.simple_loss(loss_fn), tx)
    losses = []
    with context:
        slope = jax.jit(jax.grad(loss_fn))(params, given)
        jitted = jax.jit(step, out_shardings=where)
        for _ in range(STEPS):
            state, metrics = jitted(state, params, given)
            losses.append(metrics["loss"])
    return jax.device_get((losses, slope, adapters, state.adapters))


def apart(x, y):
    """The distance between two trees, relative to the first."""
    norm = lambda tree: sum((leaf**2).sum() for leaf in jax.tree.leaves(tree)) ** 0.5
    return float(norm(jax.tree.map(lambda a, b: a - b, x, y)) / norm(x))


def bent():
    """How much the loss changes without segments and windows."""
    model, given = model_of("plain"), batch()
    params = jax.jit(model.init)(jax.random.key(0), given["inputs"])["params"]
    params = jax.tree.map(lambda x: x * 5 if x.ndim > 2 else x, params)
    bare = {k: x for k, x in given.items() if k not in ("segments", "positions")}
    here = jax.jit(loss_of(model))(params, given)
    others = [
        jax.jit(loss_of(model))(params, bare),
        jax.jit(loss_of(model_of("plain", windows=())))(params, given),
    ]
    return min(float(abs(here - other)) for other in others)


if __name__ == "__main__":
    assert jax.device_count() == 8 and jax.config.jax_enable_x64
    # a cast to float32 on the way would turn 1e-16 into 1e-7 wherever rounding flips
    layers.head = lambda x, embed, config: layers.projection(
        config.vocabulary, "head", config
    )(x)
    tiles.TILE = 4
    alone, difference = run(None), bent()
    for name in sys.argv[1].split(","):
        many = run(sharding.make_mesh(**MESHES[name]))
        found = {
            "mesh": name,
            "loss": apart(alone[0], many[0]),
            "gradient": apart(alone[1], many[1]),
            "adapters": apart(alone[3], many[3]),
            "moved": apart(alone[2], alone[3]),
            "bent": difference,
        }
        print(json.dumps(found), flush=True)
