"""A tiny mixture of experts on one device and on meshes that split its experts.

    python -m tests.expert_cases MESHES     with JAX_ENABLE_X64, in float64

prints as JSON how far each mesh is from one device.
"""

import contextlib
import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

import lorax
from lorax import sharding
from lorax.models import layers, mixture, table
from tests.context_cases import apart

MESHES = {
    "mixed": {"fsdp": 2, "expert": 2, "tensor": 2},
    "experts": {"fsdp": 1, "expert": 8},
    "context": {"fsdp": 1, "expert": 2, "context": 2, "tensor": 2},
}
SIZES = {
    "vocabulary": 32,
    "width": 16,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 4,
    "hidden": 12,
    "experts": 8,
    "chosen": 2,
    "expert_bias": True,
    "model_type": "gpt_oss",  # its parameter table has expert biases
}
TARGET = lorax.Target("all-linear", rank=2, dtype=jnp.float64)


def losses(mesh, params, tokens, model):
    """Losses, and gradients of the parameters and of adapters."""

    def loss(params, tokens):
        logits = model.apply({"params": params}, tokens)
        return (jax.nn.log_softmax(logits)[..., 3] ** 2).mean()

    kernels = lorax.discover(loss, params, tokens)
    adapters, _ = lorax.init(jax.random.key(2), params, TARGET, kernels)
    adapters = jax.tree.map(lambda x: x + 0.05, adapters)
    context = contextlib.nullcontext()
    if mesh is not None:
        config = model.config
        axes = table.logical_axes(mixture.entries(config), config.stacks, config.scan)
        params = jax.device_put(params, sharding.place(params, mesh, axes).tree(params))
        tokens = jax.device_put(tokens, sharding.batch_sharding(mesh))
        context = jax.set_mesh(mesh)
    adapted = lorax.adapt(loss, on_merge="error")
    with context:
        plain = jax.jit(jax.value_and_grad(loss))(params, tokens)
        tuned = jax.jit(jax.value_and_grad(adapted))(adapters, params, tokens)
    return jax.device_get((plain, tuned))


def cases():
    """Parameters: drawn ones; a router that sends all to two experts; so by "dense"."""
    wide = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    model = mixture.Model(mixture.Config(**SIZES, **wide))
    tokens = np.random.default_rng(0).integers(0, 32, (8, 16))
    params = jax.jit(model.init)(jax.random.key(1), tokens)["params"]
    params = jax.tree.map(lambda x: x * 8 + 0.1 if x.ndim > 2 else x, params)
    yield "even", params, tokens, model
    router = jax.tree.map(jnp.zeros_like, params["layers"]["router"])
    params = params | {"layers": params["layers"] | {"router": router}}
    yield "uneven", params, tokens, model
    config = dataclasses.replace(model.config, dispatch="dense")
    yield "dense", params, tokens, mixture.Model(config)


if __name__ == "__main__":
    assert jax.device_count() == 8 and jax.config.jax_enable_x64
    # a cast to float32 on the way would turn 1e-16 into 1e-7
    layers.head = lambda x, embed, config: layers.projection(
        config.vocabulary, "head", config
    )(x)
    for load, *case in cases():
        alone = losses(None, *case)
        for name in sys.argv[1].split(","):
            many = losses(sharding.make_mesh(**MESHES[name]), *case)
            found = {
                "mesh": name,
                "load": load,
                "plain": apart(alone[0], many[0]),
                "adapted": apart(alone[1], many[1]),
                "moved": abs(float(alone[0][0] - alone[1][0])),
            }
            print(json.dumps(found), flush=True)
