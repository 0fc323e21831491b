"""GPT-2 against transformers: switches, cache, adapters on the fused kernel."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax.interop import hf
from lorax.models import gpt2
from tests.models import golden

transformers = pytest.importorskip("transformers", reason="needs the golden extra")
torch = pytest.importorskip("torch", reason="needs the golden extra")

SIZES = {
    "vocab_size": 61,
    "n_positions": 32,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
CASES = {
    "plain": {"layer_norm_epsilon": 1e-2},
    "by layer": {"scale_attn_by_inverse_layer_idx": True, "n_inner": 40},
    "no scale": {"scale_attn_weights": False, "activation_function": "relu"},
    "untied": {"tie_word_embeddings": False},
}
MUTATIONS = {
    "eps": ("plain", {"eps": 1e-5}),
    "activation": ("plain", {"activation": "relu"}),
    "scale_by_layer": ("by layer", {"scale_by_layer": False}),
    "scale": ("no scale", {"scale": True}),
    "tied": ("untied", {"tied": True}),
}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            config = transformers.GPT2Config(**SIZES, **CASES[name])
            model = golden.redraw(transformers.GPT2LMHeadModel(config), size=2.0)
            directory = tmp_path_factory.mktemp("gpt2")
            model.save_pretrained(directory)
            tokens = golden.tokens_of(61, time=24)
            made[name] = directory, model, tokens, golden.reference(model, tokens)
        return made[name]

    return make


def apply(model, params, tokens, **kwargs):
    return jax.jit(lambda p: model.apply({"params": p}, tokens, **kwargs))(params)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(case, name):
    directory, _, tokens, expected = case(name)
    model, params = hf.load(directory)
    golden.assert_close(apply(model, params, tokens), expected)
    assert gpt2.Config.from_hf(model.config.to_hf()) == model.config


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_switch_matters(case, name):
    base, changed = MUTATIONS[name]
    directory, _, tokens, expected = case(base)
    model, params = hf.load(directory)
    assert all(getattr(model.config, k) != v for k, v in changed.items())
    mutant = gpt2.Model(dataclasses.replace(model.config, **changed))
    golden.assert_apart(apply(mutant, params, tokens), expected)


@pytest.mark.parametrize("scan", [True, False])
def test_left_padding_and_cache(case, scan):
    directory, reference, tokens, _ = case("by layer")
    real = golden.left_padded([24, 9], 24)
    positions = np.maximum(real.cumsum(1) - 1, 0)
    expected = golden.reference(reference, tokens, real, positions)
    model, params = hf.load(directory, scan=scan)
    golden.assert_close(apply(model, params, tokens, real=real), expected, real)
    read = jax.jit(
        lambda p, part, real, cache: model.apply(
            {"params": p}, part, real=real, cache=cache
        )
    )
    cache, found = model.cache(2, 24), []
    for part in (slice(0, 20), *(slice(i, i + 1) for i in range(20, 24))):
        logits, cache = read(params, tokens[:, part], real[:, part], cache)
        found.append(logits)
    golden.assert_close(np.concatenate(found, axis=1), expected, real)


def test_an_adapter_on_the_fused_kernel_is_one(case):
    directory, _, tokens, _ = case("plain")
    model, params = hf.load(directory)

    def loss(params, tokens):
        return jnp.mean(model.apply({"params": params}, tokens) ** 2)

    targets = [lorax.Target(".*/(qkv|o|up|down)/kernel", rank=2)]
    kernels = lorax.discover(loss, params, tokens)
    adapters, params = lorax.init(jax.random.key(0), params, targets, kernels)
    fused = adapters["layers/qkv/kernel"]
    assert fused.a.shape == (3, 32, 2) and fused.b.shape == (3, 2, 3, 4, 8)
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    value, slope = jax.jit(jax.value_and_grad(lorax.adapt(loss, on_merge="error")))(
        adapters, params, tokens
    )
    merged = loss(lorax.merge(adapters, params), tokens)
    np.testing.assert_allclose(value, merged, rtol=1e-5)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(slope))


def test_dropout_is_for_training():
    config = gpt2.Config(61, 16, 32, 2, 4, 64, dropout=0.5)
    model, tokens = gpt2.Model(config), golden.tokens_of(61, time=8)
    params = model.init(jax.random.key(0), tokens)["params"]
    draw = jax.jit(
        lambda key: model.apply(
            {"params": params}, tokens, deterministic=False, rngs={"dropout": key}
        )
    )
    still = model.apply({"params": params}, tokens)
    one, other = draw(jax.random.key(1)), draw(jax.random.key(2))
    assert not np.allclose(one, other) and not np.allclose(one, still)
    np.testing.assert_array_equal(one, draw(jax.random.key(1)))


def test_bf16_computes_in_bf16_and_answers_in_float32(case):
    directory, _, tokens, expected = case("plain")
    model, params = hf.load(directory, dtype=jnp.bfloat16)
    logits = apply(model, params, tokens)
    assert logits.dtype == jnp.float32
    assert jax.tree.leaves(params)[0].dtype == jnp.float32
    error = np.abs(logits - expected).max() / expected.std()
    assert 1e-4 < error < 0.2
