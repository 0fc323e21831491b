"""The Llama family against transformers: every switch, cache, padding, packing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax.interop import hf
from lorax.models import llama
from tests.models import golden

transformers = pytest.importorskip("transformers", reason="needs the golden extra")
torch = pytest.importorskip("torch", reason="needs the golden extra")

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "beta_fast": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
CASES = {
    "llama": ("Llama", {"rms_norm_eps": 1e-2}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "head_dim": 16}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "linear": ("Llama", {"rope_parameters": LINEAR, "hidden_act": "gelu"}),
    "yarn": ("Llama", {"rope_parameters": YARN}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Makes a case's model once: directory, tokens and reference logits."""
    made = {}

    def make(name):
        if name not in made:
            kind, fields = CASES[name]
            config = getattr(transformers, f"{kind}Config")(**{**SIZES, **fields})
            model = getattr(transformers, f"{kind}ForCausalLM")(config)
            golden.redraw(model, size=2.0)
            directory = tmp_path_factory.mktemp(name)
            model.save_pretrained(directory)
            tokens = golden.tokens_of(61, time=40)  # beyond window and original length
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
    written = model.config.to_hf()
    assert llama.Config.from_hf(written) == model.config


MUTATIONS = {
    "eps": ("llama", {"eps": 1e-6}),
    "heads share": ("llama", {"rope": llama.rope.Rope(base=20_000.0)}),
    "activation": ("llama", {"activation": "gelu"}),
    "qkv_bias": ("llama-biases", {"qkv_bias": False}),
    "o_bias": ("llama-biases", {"o_bias": False}),
    "mlp_bias": ("llama-biases", {"mlp_bias": False}),
    "llama3": ("llama3", {"rope": llama.rope.Rope(base=500.0)}),
    "linear": ("linear", {"rope": llama.rope.Rope(base=500.0)}),
    "yarn": ("yarn", {"rope": llama.rope.Rope(base=500.0)}),
    "window": ("mistral", {"windows": ()}),
    "window + 1": ("mistral", {"windows": (6, 6, 6)}),
    "windowed layers": ("qwen2-window", {"windows": (6, 6, 6)}),
    "qwen2 biases": ("qwen2", {"qkv_bias": False}),
    "qk_norm": ("qwen3", {"qk_norm": False}),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_switch_matters(case, name):
    base, changed = MUTATIONS[name]
    directory, _, tokens, expected = case(base)
    model, params = hf.load(directory)
    assert all(getattr(model.config, k) != v for k, v in changed.items())
    mutant = llama.Model(dataclasses.replace(model.config, **changed))
    golden.assert_apart(apply(mutant, params, tokens), expected)


def test_yarn_gain_matters_by_itself(case):
    directory, _, tokens, expected = case("yarn")
    model, params = hf.load(directory)
    rope = dataclasses.replace(model.config.rope, attention=1.0)
    mutant = llama.Model(dataclasses.replace(model.config, rope=rope))
    golden.assert_apart(apply(mutant, params, tokens), expected)


def test_an_untied_head_is_its_own(case):
    directory, _, tokens, expected = case("llama-tied")
    model, params = hf.load(directory)
    mutant = llama.Model(dataclasses.replace(model.config, tied=False))
    head = {"kernel": jnp.roll(params["embed"]["embedding"].T, 1, axis=1)}
    golden.assert_apart(apply(mutant, {**params, "head": head}, tokens), expected)


@pytest.mark.parametrize("scan", [True, False])
def test_left_padding_and_cache(case, scan):
    directory, reference, tokens, _ = case("qwen2-window")
    real = golden.left_padded([40, 23], 40)
    positions = np.maximum(real.cumsum(1) - 1, 0)
    expected = golden.reference(reference, tokens, real, positions)
    model, params = hf.load(directory, scan=scan)
    golden.assert_close(apply(model, params, tokens, real=real), expected, real)
    golden.assert_close(golden.cached(model, params, tokens, real), expected, real)


def test_packed_documents_do_not_see_each_other(case):
    directory, reference, tokens, _ = case("mistral")
    model, params = hf.load(directory)
    segments = np.repeat([[0, 1]], [13, 27], axis=1)
    positions = np.concatenate([np.arange(13), np.arange(27)])[None]
    packed = apply(model, params, tokens[:1], segments=segments, positions=positions)
    alone = golden.reference(reference, tokens[:1, 13:])
    golden.assert_close(packed[:, 13:], alone)
    with pytest.raises(ValueError, match="segments"):
        model.apply(
            {"params": params}, tokens, segments=segments, cache=model.cache(2, 64)
        )


def test_remat_changes_no_gradient(case):
    directory, _, tokens, _ = case("qwen3")
    model, params = hf.load(directory)

    def slope(remat):
        config = dataclasses.replace(model.config, remat=remat)
        own = llama.Model(config)
        loss = lambda p: jnp.mean(own.apply({"params": p}, tokens[:, :8]) ** 2)
        return jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(params))

    kept = slope("none")
    for again in (slope("full"), slope("dots")):
        for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(again)):
            np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-5 * np.abs(a).max())
