"""Text models of multimodal checkpoints against transformers, and PEFT on the whole."""

import json
import warnings

import jax
import numpy as np
import pytest
import safetensors.numpy

import lorax
from lorax.interop import hf, multimodal
from lorax.interop import peft as ours
from tests.models import golden

transformers = pytest.importorskip("transformers", reason="needs the golden extra")
torch = pytest.importorskip("torch", reason="needs the golden extra")

GEMMA3 = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "query_pre_attn_scalar": 9,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
}
SIGLIP = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TOKENS = golden.tokens_of(50, time=20)  # no image tokens, longer than the window


GEMMA4 = {
    **{name: value for name, value in GEMMA3.items() if "scalar" not in name},
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": 61,
}
SEEN = {
    **{name: SIGLIP[name] for name in ("hidden_size", "intermediate_size")},
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "patch_size": 4,
    "position_embedding_size": 16,
}


def gemma3():
    config = transformers.Gemma3Config(
        text_config=GEMMA3,
        vision_config=SIGLIP,
        mm_tokens_per_image=4,
        image_token_index=60,
        boi_token_index=59,
        eoi_token_index=58,
        attn_implementation="eager",
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def gemma4():
    config = transformers.Gemma4Config(
        text_config=GEMMA4, vision_config=SEEN, attn_implementation="eager"
    )
    return transformers.Gemma4ForConditionalGeneration(config)


def written(model, directory):
    """The directory, the redrawn model, and its logits for text."""
    golden.redraw(model, size=2.0)
    for layer in model.model.language_model.layers:  # these do not scale scores
        layer.self_attn.q_norm.weight.data *= 0.3
    model.save_pretrained(directory)
    return directory, model, golden.reference(model, TOKENS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return written(gemma3(), tmp_path_factory.mktemp("gemma3"))


def test_gemma_4(tmp_path):
    directory, _, expected = written(gemma4(), tmp_path / "whole")
    with pytest.warns(UserWarning, match=r"gemma4_text; not read: .*embed_vision"):
        model, params = hf.load(directory)
    golden.assert_close(model.apply({"params": params}, TOKENS), expected)
    hf.save(tmp_path, model.config, params)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == (
        "gemma4_text"
    )


def copied(directory, folder, config=None, rename=lambda key: key):
    """A copy of the checkpoint with its config or names changed."""
    told = json.loads((directory / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps(told))
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    tensors = {rename(key): tensor for key, tensor in tensors.items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def loaded(directory):
    with pytest.warns(UserWarning, match="reads only the text model, gemma3_text"):
        return hf.load(directory)


def fifth(key):
    """The module names of transformers 5."""
    inside = key.replace("language_model.model.", "language_model.")
    return f"model.{inside}"


@pytest.mark.parametrize("layout", ["4", "5"])
def test_the_text_model_in_both_layouts(whole, tmp_path, layout):
    directory, _, expected = whole
    if layout == "5":
        directory = copied(directory, tmp_path, rename=fifth)
    model, params = loaded(directory)
    golden.assert_close(model.apply({"params": params}, TOKENS), expected)


def test_what_is_left_unread_is_named(whole):
    directory = whole[0]
    keys = list(safetensors.numpy.load_file(directory / "model.safetensors"))
    towers = sum(key.startswith("vision_tower.") for key in keys)
    with pytest.warns(UserWarning, match="not read: ") as heard:
        hf.load(directory)
    (warning,) = heard
    assert "multi_modal_projector (2 tensors)" in str(warning.message)
    assert f"vision_tower ({towers} tensors)" in str(warning.message)
    assert warning.filename == __file__


def test_it_is_saved_as_a_text_model(whole, tmp_path):
    directory, _, expected = whole
    model, params = loaded(directory)
    hf.save(tmp_path, model.config, params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, _ = hf.load(tmp_path)
    assert again.config == model.config
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    assert type(theirs) is transformers.Gemma3ForCausalLM
    golden.assert_close(golden.reference(theirs.eval(), TOKENS), expected)


def test_a_tensor_that_the_text_lacks_is_missing(whole, tmp_path):
    def rename(key):
        return key.replace("language_model.model.norm", "vision_tower.norm")

    directory = copied(whole[0], tmp_path, rename=rename)
    with (
        pytest.warns(UserWarning, match="not read"),
        pytest.raises(ValueError, match=r"missing: model.norm.weight"),
    ):
        hf.load(directory)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model_type": "gemma2"}, "'gemma3_text', and in text_config 'gemma2'"),
        (
            {"tie_word_embeddings": False},
            "tie_word_embeddings of the text model is True, and.*False",
        ),
    ],
)
def test_a_text_config_that_disagrees_is_refused(whole, tmp_path, fields, message):
    text = json.loads((whole[0] / "config.json").read_text())["text_config"]
    directory = copied(whole[0], tmp_path, {"text_config": text | fields})
    with pytest.raises(ValueError, match=message):
        hf.load(directory)


def test_an_unknown_field_of_the_whole_is_refused(whole, tmp_path):
    directory = copied(whole[0], tmp_path, {"deep_fusion": True})
    with pytest.raises(ValueError, match="unknown fields.*deep_fusion"):
        hf.load(directory)


PATTERN = r".*language_model.*\.(q_proj|down_proj)"


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["gate_proj", "o_proj"]},
        {"target_modules": PATTERN},
        {"target_modules": PATTERN, "modules_to_save": ["language_model.norm"]},
    ],
)
def test_adapters_of_the_multimodal_model(whole, tmp_path, fields):
    peft = pytest.importorskip("peft", reason="needs the golden extra")
    directory, _, plain = whole
    base = transformers.Gemma3ForConditionalGeneration.from_pretrained(
        directory, attn_implementation="eager"
    )
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied weights
        adapted = peft.get_peft_model(base, config).eval()
        adapted.save_pretrained(tmp_path)
    model, params = loaded(directory)
    adapters = ours.load(tmp_path, model.config)

    def call(params):
        return model.apply({"params": params}, TOKENS)

    found = jax.jit(lorax.adapt(call))(adapters, params)
    expected = golden.reference(adapted, TOKENS)
    golden.assert_close(found, expected)
    golden.assert_apart(np.asarray(plain), expected)


def test_names_are_of_the_whole_or_of_the_text():
    for name, front in multimodal.PREFIXES.items():
        seen = multimodal.prefix(f"{name}layers.0.mlp")
        assert seen == name
        assert multimodal.inner(f"{name}layers.0.mlp", seen) == f"{front}layers.0.mlp"
    assert multimodal.prefix("vision_tower.layers.0.mlp") == ""
