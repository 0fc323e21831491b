"""The Pallas kernel, by its interpreter on the CPU, against plain attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import lorax
from lorax import sharding
from lorax.models import context, flash, layers, llama

B, T, HEADS, KV, DIM = 2, 256, 4, 2, 128


def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = (HEADS, KV, KV)
    return [
        jax.random.normal(key, (B, T, n, DIM))
        for key, n in zip(keys, sizes, strict=True)
    ]


def test_flash_is_plain_attention():
    q, k, v = inputs()
    real = jnp.arange(T) < jnp.array([T, 200])[:, None]
    segments = jnp.arange(T)[None] // 100 * jnp.ones((B, 1), jnp.int32)
    mask, _ = context.causal_mask(T, real, segments, None)

    def loss(attend, q, k, v):
        return (jnp.where(real[..., None, None], attend(q, k, v), 0) ** 2).sum()

    plain = lambda q, k, v: layers.attend(q, k, v, mask)
    thin = lambda q, k, v: flash.attend(q, k, v, flash.segments_of(real, segments))
    with pltpu.force_tpu_interpret_mode(), jax.default_matmul_precision("float32"):
        value = jax.jit(lambda *x: jax.value_and_grad(loss, (1, 2, 3))(thin, *x))
        got = value(q, k, v)
    want = jax.value_and_grad(loss, (1, 2, 3))(plain, q, k, v)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4)


def test_what_flash_refuses():
    config = llama.Config(vocabulary=8, width=8, layers=1, heads=2, kv_heads=2)
    with pytest.raises(ValueError, match="choose 'plain' or 'flash'"):
        dataclasses.replace(config, attention="fast")
    with pytest.raises(ValueError, match="'flash' has no windows"):
        dataclasses.replace(config, attention="flash", windows=(4,))
    q = jnp.ones((1, 130, 2, 8))
    with pytest.raises(ValueError, match="multiple of 128 tokens, not 130"):
        flash.attend(q, q, q)


def test_every_device_takes_its_rows_and_heads():
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    q = jax.ShapeDtypeStruct((8, 128, 4, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((8, 128, 2, 128), jnp.bfloat16)
    with jax.set_mesh(mesh):
        text = str(jax.make_jaxpr(flash.attend)(q, k, k))
    assert "shard_map" in text and "bf16[2,2,128,128]" in text


def test_the_same_kernels_are_adapted_with_flash():
    found = {}
    for attention in ("plain", "flash"):
        config = llama.Config(
            vocabulary=8,
            width=8,
            layers=2,
            heads=2,
            kv_heads=1,
            head_dim=128,
            hidden=8,
            attention=attention,
        )
        model = llama.Model(config)
        tokens = jnp.zeros((2, 128), jnp.int32)
        params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
        loss_fn = lambda p, x, model=model: model.apply({"params": p}, x).sum()
        kernels = lorax.discover(loss_fn, params, tokens)
        found[attention] = {path: (k.op, k.axes, k.head) for path, k in kernels.items()}
    assert found["flash"] == found["plain"]
    assert [path for path, k in found["plain"].items() if k[2]] == ["head/kernel"]
