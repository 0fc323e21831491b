"""A small training state with everything in it, and a test for equality."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lorax import training
from lorax.adapters import Full, Lora
from lorax.types import Axes


def base(seed=0):
    """A tree with the shapes that `fresh` adapts."""
    draw = np.random.default_rng(seed).standard_normal
    return {
        "dense": {"kernel": jnp.asarray(draw((6, 4)), jnp.bfloat16)},
        "head": jnp.asarray(draw(4), jnp.float32),
    }


def fresh(rank=2, scale=2.0, tx=None, head=True, impl="threefry2x32"):
    """A state of zeros, before the first step."""
    axes = Axes((0,), (1,))
    adapters = {
        "dense/kernel": Lora(jnp.zeros((6, rank)), jnp.zeros((rank, 4)), scale, axes)
    }
    if head:
        adapters["head"] = Full(jnp.zeros(4))
    model_state = {"mean": jnp.zeros(3, jnp.bfloat16), "seen": jnp.zeros((), jnp.int32)}
    key = jax.random.key(0, impl=impl)
    return training.create_state(key, adapters, tx or optax.adam(0.1), model_state)


def filled(seed, step, like=None):
    """A state with random bits in every leaf."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(seed, impl=str(jax.random.key_impl(leaf)))
        drawn = 100 * rng.standard_normal(leaf.shape)
        return jax.device_put(drawn.astype(leaf.dtype))

    state = jax.tree.map(draw, like or fresh())
    return state.replace(step=jnp.asarray(step, jnp.int32))


def bits(state):
    """Every leaf as dtype, shape and bytes."""
    found = []
    for leaf in jax.tree.leaves(state):
        dtype = str(leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        found.append((dtype, leaf.shape, np.asarray(leaf).tobytes()))
    return found


def same(left, right):
    """Whether structure, static fields and bits are the same."""
    structure = jax.tree.structure(left) == jax.tree.structure(right)
    return structure and bits(left) == bits(right)
