"""A small, interruptible training run: `python -m ... FOLDER STEPS [DEADLINE]`.

Prints a line per step, "saving" before its last save, and finally the bits of what it
trained. Noise from the step's key and a moving statistic make every part of the state
matter; batches are drawn by their position.
"""

from __future__ import annotations

import hashlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.machine import preemption
from lorax import training
from lorax.adapters import Full, Lora
from lorax.checkpoint import RunCheckpoints
from lorax.types import Axes

EVERY = 7  # steps between saves


def batch_at(position):
    return np.random.default_rng([5, position]).standard_normal((4, 6), np.float32)


def loss_fn(params, model_state, batch, key):
    noise = 0.1 * jax.random.normal(key, batch.shape)
    out = jnp.tanh((batch + noise) @ params["w"]) + params["head"]
    mean = 0.9 * model_state["mean"] + 0.1 * out.mean()
    return jnp.mean((out - mean - 1) ** 2), ({}, {"mean": mean})


def start(tx):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    lora = Lora(draw(6, 2), jnp.zeros((2, 3)), 2.0, Axes((0,), (1,)))
    params = {"w": draw(6, 3), "head": jnp.zeros(3)}
    adapters = {"w": lora, "head": Full(params["head"])}
    state = {"mean": jnp.zeros(())}
    return training.create_state(jax.random.key(1), adapters, tx, state), params


def main(folder, steps, deadline=None):
    tx = optax.adam(optax.cosine_decay_schedule(0.05, steps))
    state, params = start(tx)
    step = jax.jit(training.make_train_step(loss_fn, tx), donate_argnums=0)
    step = step.lower(state, params, batch_at(0)).compile(
        {"xla_backend_optimization_level": 0}
    )
    with (
        preemption.Preemption(deadline) as preempted,
        RunCheckpoints(folder, params, config={"steps": steps}) as checkpoints,
    ):
        restored = checkpoints.restore(state)
        if restored is not None:
            state = restored.state
        for i in range(restored.data["position"] if restored else 0, steps):
            state, _ = step(state, params, batch_at(i))
            print("step", i + 1, flush=True)
            time.sleep(0.01)
            if preempted.should_stop(i + 1):
                print("saving", flush=True)
                with preempted.saving(i + 1):
                    if deadline is not None:
                        checkpoints.wait()
                        time.sleep(60)  # a file system that hangs
                    checkpoints.save(state, {"position": i + 1})
                    checkpoints.wait()
                sys.exit(preemption.EXIT_PREEMPTED)
            if (i + 1) % EVERY == 0:
                checkpoints.save(state, {"position": i + 1})
    leaves = jax.tree.leaves(state.replace(key=jax.random.key_data(state.key)))
    content = b"".join(np.asarray(leaf).tobytes() for leaf in leaves)
    print("end", hashlib.sha256(content).hexdigest(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *map(float, sys.argv[3:]))
