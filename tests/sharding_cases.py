"""Training of a tiny Llama on one device and on meshes, for the sharding tests.

    python -m tests.sharding_cases METHOD MESH     with JAX_ENABLE_X64, in float64

prints as JSON how far the runs differ.
"""

import contextlib
import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lorax
from lorax import optim, sharding, training
from lorax.models import layers, llama, table

STEPS = 20
EPS = 1e-4  # Adam's 1e-8 would divide rounding errors by equally small gradients
MESHES = {
    "data": {"data": 8, "fsdp": 1, "tensor": 1},
    "fsdp": {"data": 1, "fsdp": 8, "tensor": 1},
    "tensor": {"data": 1, "fsdp": 1, "tensor": 8},
    "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
    "spread": {"data": 2, "fsdp": 2, "tensor": 2},  # adapters sharded, kernels gathered
}
SIZES = {"vocabulary": 48, "width": 32, "layers": 2, "heads": 16, "kv_heads": 8}


def adalora():
    """Budget 14 triplets x rank 4 falls to half between steps 4 and 16."""
    return optim.adalora(
        optax.adam(0.01, eps=EPS),
        target_budget=28,
        total_steps=STEPS,
        initial_warmup=4,
        final_steps=4,
        interval=4,
    )


METHODS = {
    "lora": ("lora", lambda: optax.adam(0.01, eps=EPS)),
    "dora": ("dora", lambda: optax.adam(0.01, eps=EPS)),
    "adalora": ("adalora", adalora),
    "lora_pro": ("lora", lambda: optim.lora_pro(0.01, eps=EPS)),
}


def cut_of(mesh):
    """How adapters are sharded in a case."""
    return "all" if mesh == "spread" else "kernels"


def model_of(dtype):
    config = llama.Config(
        **SIZES, head_dim=4, hidden=40, dtype=dtype, param_dtype=dtype
    )
    return llama.Model(config)


def loss_of(model):
    def loss_fn(params, batch):
        logits = model.apply({"params": params}, batch["tokens"][:, :-1])
        targets = batch["tokens"][:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    return loss_fn


@functools.cache
def base(dtype):
    """The model, its loss, its parameters and how the loss uses them."""
    model = model_of(dtype)
    tokens = jnp.zeros((16, 13), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    params = jax.tree.map(lambda x: x * 5 if x.ndim > 2 else x, params)  # attention
    loss_fn = loss_of(model)
    return model, loss_fn, params, lorax.discover(loss_fn, params, {"tokens": tokens})


@functools.cache
def problem(method, dtype):
    """The model, its loss, its parameters, adapters and the optimiser."""
    adapter, make_tx = METHODS[method]
    model, loss_fn, params, kernels = base(dtype)
    target = lorax.Target("all-linear", rank=4, adapter=adapter, dtype=dtype)
    init = jax.jit(lambda key, params: lorax.init(key, params, target, kernels))
    adapters, params = init(jax.random.key(1), params)
    return model, loss_fn, params, adapters, make_tx()


def place(model, params, mesh):
    config = model.config
    axes = table.logical_axes(llama.entries(config), config.stacks, config.scan)
    return sharding.place(params, mesh, axes)


def batches():
    tokens = np.random.default_rng(0).integers(0, 48, (STEPS, 16, 13), dtype=np.int32)
    return [{"tokens": t} for t in np.minimum(tokens, tokens[:, :1])]


def train(method, mesh, dtype, cut="kernels"):
    """Losses, adapters before and after, AdaLoRA's choices; None means one device."""
    model, loss_fn, params, adapters, tx = problem(method, dtype)
    if cut == "all":  # and each layer gathers its kernels itself
        gathering = dataclasses.replace(model.config, remat="gather; save=q")
        loss_fn = loss_of(llama.Model(gathering))
    state = training.create_state(jax.random.key(2), adapters, tx)
    step = training.make_train_step(training.simple_loss(loss_fn), tx)
    given = batches()
    if mesh is None:
        jitted, context = jax.jit(step), contextlib.nullcontext()
    else:
        placed = place(model, params, mesh)
        params = jax.device_put(params, placed.tree(params))
        where = sharding.state_shardings(state, placed, cut)
        state = jax.device_put(state, where)
        given = jax.device_put(given, sharding.batch_sharding(mesh))
        jitted = jax.jit(step, out_shardings=(where, sharding.replicated(mesh)))
        context = jax.set_mesh(mesh)
    fast = {"xla_backend_optimization_level": 0}
    with context:
        compiled = jitted.lower(state, params, given[0]).compile(fast)
    losses, choices, before = [], [], state
    for batch in given:
        state, metrics = compiled(state, params, batch)
        losses.append(metrics["loss"])
        if method == "adalora":
            choices.append((int(state.opt_state.budget), state.opt_state.mask))
    if mesh is not None:
        same = lambda new, old: new.sharding.is_equivalent_to(old.sharding, old.ndim)
        assert all(jax.tree.leaves(jax.tree.map(same, state, before)))
    return jax.device_get((losses, adapters, state.adapters, choices))


def compare(one, many):
    """How far apart the runs are, and how far the first one moved."""
    norm = lambda x: float(np.linalg.norm(np.asarray(x, np.float64)))
    # lam of a kernel that AdaLoRA has emptied is exactly zero
    apart = jax.tree.map(lambda x, y: norm(x - y) / (norm(x) or 1.0), one[2], many[2])
    move = sum(norm(x - y) ** 2 for x, y in both(one[2], one[1]))
    size = sum(norm(x) ** 2 for x in jax.tree.leaves(one[1]))
    found = {
        "loss": max(abs(a - b) / abs(a) for a, b in zip(one[0], many[0], strict=True)),
        "adapters": max(jax.tree.leaves(apart)),
        "moved": (move / size) ** 0.5,
    }
    if one[3]:
        pairs = both(one[3], many[3])
        found["masks"] = all(np.array_equal(*pair) for pair in pairs)
        found["budgets"] = len({budget for budget, _ in one[3]})
        masks = [jax.tree.leaves(mask) for _, mask in one[3]]
        changes = zip(masks[:-1], masks[1:], strict=True)
        found["choices"] = sum(
            any((x != y).any() for x, y in zip(old, new, strict=True))
            for old, new in changes
        )
    return jax.tree.map(lambda x: x if isinstance(x, bool | int) else float(x), found)


def both(x, y):
    return zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)


def head(x, embed, config):
    """`layers.head` without its cast to float32."""
    return layers.projection(config.vocabulary, "head", config)(x)


if __name__ == "__main__":
    assert jax.device_count() == 8 and jax.config.jax_enable_x64
    # rounding to float32 on the way would turn 1e-16 into 1e-7 wherever it flips
    layers.head = head
    for method in sys.argv[1].split(","):
        alone = train(method, None, jnp.float64)
        for name in sys.argv[2].split(","):
            mesh = sharding.make_mesh(**MESHES[name])
            many = train(method, mesh, jnp.float64, cut_of(name))
            found = compare(alone, many)
            print(json.dumps({"method": method, "mesh": name, **found}), flush=True)
