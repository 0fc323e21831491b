"""Encoders and T5: PEFT's merged weights equal ours."""

import functools
import json
import tempfile
import warnings

import jax
import numpy as np
import pytest
import safetensors.numpy

import lorax
from lorax.adapters import Lora
from lorax.interop import hf
from lorax.interop import peft as ours
from tests.interop import peft_cases as cases

transformers = pytest.importorskip("transformers", reason="needs the golden extra")
torch = pytest.importorskip("torch", reason="needs the golden extra")
peft = pytest.importorskip("peft", reason="needs the golden extra")
TOKENS = cases.TOKENS
SIZES = dict(
    vocab_size=29,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=20,
)


@functools.cache
def base(name):
    if name == "t5":
        config = transformers.T5Config(
            vocab_size=29, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2
        )
        model = transformers.T5ForConditionalGeneration(config)
        return cases.golden.redraw(model, size=5.0)
    if name.startswith("vit"):
        sizes = {k: n for k, n in SIZES.items() if k[0] not in "vm"}  # no token sizes
        sizes |= {"image_size": 8, "patch_size": 4, "num_channels": 1}
        config = transformers.ViTConfig(num_labels=3, **sizes)
        if name == "vit bare":
            made = transformers.ViTModel(config, add_pooling_layer=False)
        else:
            made = transformers.ViTForImageClassification(config)
        return cases.golden.redraw(made, size=2.0)
    if name == "deberta":
        distances = {"relative_attention": True, "pos_att_type": "p2c|c2p"}
        distances |= {"position_buckets": 4, "share_att_key": True}
        config = transformers.DebertaV2Config(num_labels=3, **SIZES, **distances)
        made = transformers.DebertaV2ForSequenceClassification(config)
        return cases.golden.redraw(made, size=2.0)
    kinds = {
        "roberta": (transformers.RobertaConfig, "RobertaForSequenceClassification"),
        "bert": (transformers.BertConfig, "BertForSequenceClassification"),
        "mlm": (transformers.RobertaConfig, "RobertaForMaskedLM"),
    }
    config, model = kinds[name]
    extra = {} if name == "bert" else {"type_vocab_size": 1, "pad_token_id": 1}
    made = getattr(transformers, model)(config(num_labels=3, **SIZES, **extra))
    return cases.golden.redraw(made, size=3.0)


def fresh(name):
    more = {"add_pooling_layer": False} if name == "vit bare" else {}
    model = type(base(name))(base(name).config, **more)
    model.load_state_dict(base(name).state_dict())
    return model


@functools.cache
def own(name):
    with tempfile.TemporaryDirectory() as folder:
        base(name).save_pretrained(folder)
        model, params = hf.load(folder)
    return model.config, params


CASES = {
    "roberta": dict(
        r=2, target_modules=["query", "value"], task_type="SEQ_CLS", use_rslora=True
    ),
    "bert": dict(r=2, target_modules="all-linear", modules_to_save=["classifier"]),
    "deberta": dict(
        r=2,
        target_modules=["query_proj", "value_proj"],
        task_type="SEQ_CLS",
        modules_to_save=["classifier", "pooler"],
    ),
    "vit": dict(r=2, target_modules="all-linear", modules_to_save=["classifier"]),
    "vit bare": dict(r=2, target_modules=["q_proj", "fc1"]),
    "mlm": dict(r=2, target_modules=["output.dense", "word_embeddings", "decoder"]),
    "t5": dict(r=2, target_modules=["q", "v", "wo", "relative_attention_bias"]),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_merged_weights(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)  # for PEFT's own draws
        model = peft.get_peft_model(fresh(name), peft.LoraConfig(**CASES[name]))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p += 0.3 * torch.randn(p.shape, generator=generator)
            if name == "mlm":  # one leaf here: the head shares the embedding's factors
                parts = model.base_model.model
                table = parts.roberta.embeddings.word_embeddings
                head = parts.lm_head.decoder
                head.lora_A["default"].weight.copy_(table.lora_embedding_B["default"].T)
                head.lora_B["default"].weight.copy_(table.lora_embedding_A["default"].T)
        model.save_pretrained(tmp_path / "theirs")
    config, params = own(name)
    adapters = ours.load(tmp_path / "theirs", config)
    ours.save(tmp_path / "ours", adapters, config)
    for folder in ("theirs", "ours"):
        if name != "vit bare":  # it has none
            compare_logits(name, adapters, tmp_path / folder)
        # PEFT merges the two halves of what is tied into one weight: twice too much
        if name != "mlm":
            compare(name, adapters, tmp_path / folder)


OLD_MODULES = {  # of transformers 4, as its modeling_vit.py has them
    "vit.layers.0.attention.q_proj": "vit.encoder.layer.0.attention.attention.query",
    "vit.layers.1.attention.q_proj": "vit.encoder.layer.1.attention.attention.query",
    "vit.layers.0.attention.o_proj": "vit.encoder.layer.0.attention.output.dense",
    "vit.layers.1.attention.o_proj": "vit.encoder.layer.1.attention.output.dense",
    "vit.layers.0.mlp.fc1": "vit.encoder.layer.0.intermediate.dense",
    "vit.layers.1.mlp.fc1": "vit.encoder.layer.1.intermediate.dense",
    "vit.layers.0.mlp.fc2": "vit.encoder.layer.0.output.dense",
    "vit.layers.1.mlp.fc2": "vit.encoder.layer.1.output.dense",
}


def test_the_modules_of_older_transformers(tmp_path):
    config, _ = own("vit")
    modules = ["q_proj", "o_proj", "fc1", "fc2"]
    made = peft.LoraConfig(r=2, target_modules=modules, init_lora_weights=False)
    peft.get_peft_model(fresh("vit"), made).save_pretrained(tmp_path)
    adapters = ours.load(tmp_path, config)
    file = tmp_path / "adapter_model.safetensors"
    told = tmp_path / "adapter_config.json"
    tensors = safetensors.numpy.load_file(file)
    for new, old in OLD_MODULES.items():
        tensors = {key.replace(f"{new}.", f"{old}."): x for key, x in tensors.items()}
    assert len([key for key in tensors if "encoder.layer" in key]) == len(tensors) == 16
    safetensors.numpy.save_file(tensors, file)
    asked = json.loads(told.read_text()) | {"target_modules": ["query", "dense"]}
    told.write_text(json.dumps(asked))
    jax.tree.map(np.testing.assert_array_equal, ours.load(tmp_path, config), adapters)
    told.write_text(json.dumps(asked | {"target_modules": ["query", "key", "dense"]}))
    with pytest.raises(ValueError, match=r"no factors for '.*k_proj'"):
        ours.load(tmp_path, config)


def compare_logits(name, adapters, folder):
    """Compares PEFT's logits with ours, and checks that the adapter changes them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(fresh(name), folder)
    config, params = own(name)
    family = hf.family_of(config.to_hf(), name)
    inputs = (TOKENS,) * getattr(family, "INPUTS", 1)  # a decoder gets the same
    told = {"input_ids": torch.tensor(TOKENS)}
    if name == "t5":
        told["decoder_input_ids"] = torch.tensor(TOKENS)
    if name == "vit":
        inputs = (np.random.default_rng(0).standard_normal((2, 8, 8, 1)),)
        told = {"pixel_values": torch.tensor(inputs[0]).permute(0, 3, 1, 2)}
    run = jax.jit(
        lambda params: family.Model(config).apply({"params": params}, *inputs)
    )
    with torch.no_grad():
        expected = model.eval().double()(**told).logits.numpy()
    cases.golden.assert_same(run(lorax.merge(adapters, params)), expected)
    cases.golden.assert_apart(run(params), expected)


def compare(name, adapters, folder):
    """Compares PEFT's merged weights with ours, in all modules."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(fresh(name), folder)
        theirs = model.merge_and_unload().state_dict()
    assert not [w for w in told if "missing" in str(w.message)]
    config, params = own(name)
    before = hf.to_disk(config, params)
    after = hf.to_disk(config, lorax.merge(adapters, params))
    moved = 0
    for key, tensor in after.items():
        want = theirs[key].numpy()
        np.testing.assert_allclose(tensor, want, atol=1e-5, err_msg=key)
        moved += np.abs(want - before[key]).max() > 1e-3
    layers = [len(getattr(a, "layers", None) or [0]) for a in adapters.values()]
    assert moved >= len(layers)


def test_the_shared_embedding_of_t5_is_refused(tmp_path):
    config, params = own("t5")
    table = params["embed"]["embedding"]
    lora = Lora(table[:, :2], table[:2], 1.0, lorax.Axes((0,), (1,)))
    with pytest.raises(ValueError, match="'shared' is an embedding that encoder"):
        ours.save(tmp_path, {"embed/embedding": lora}, config)


def test_rows_of_the_shared_embedding_of_t5(tmp_path):
    """Encoder, decoder and head follow it, in PEFT and here."""
    given = peft.LoraConfig(target_modules=["q"], trainable_token_indices=[7, 3])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)  # of PEFT's own draws
        model = peft.get_peft_model(fresh("t5"), given)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p += 0.3 * torch.randn(p.shape, generator=generator)
        model.save_pretrained(tmp_path / "theirs")
    config, params = own("t5")
    adapters = ours.load(tmp_path / "theirs", config, params)
    assert adapters["embed/embedding"].rows == (3, 7)
    ours.save(tmp_path / "ours", adapters, config, params=params)
    for folder in ("theirs", "ours"):
        compare_logits("t5", adapters, tmp_path / folder)
