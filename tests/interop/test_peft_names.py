"""PEFT's adapters in the spellings found in the wild, by hand and from real PEFT."""

import json
import warnings

import jax
import numpy as np
import pytest
import safetensors.numpy

from lorax.interop import peft as ours
from lorax.models import gpt2, roberta, t5
from tests.interop import peft_cases as cases
from tests.interop.test_peft_errors import CONFIG, tensors, write

FRONT = "base_model.model."


def respelled(change):
    return {change(key): array for key, array in tensors().items()}


def same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


SPELLINGS = {
    "no front": lambda k: k.removeprefix(FRONT),
    "front twice": lambda k: FRONT + k,
    "front three times": lambda k: FRONT + FRONT + k,
    "adapter's name": lambda k: k.replace(".weight", ".default.weight"),
    "another name": lambda k: k.replace(".weight", ".my-lora_2.weight"),
    "no .weight": lambda k: k.removesuffix(".weight"),
    "data parallel": lambda k: "module." + k,
    "data parallel inside": lambda k: k.replace(FRONT, FRONT + "module."),
    "compiled": lambda k: "_orig_mod." + k,
    "compiled inside": lambda k: k.replace(FRONT, FRONT + "_orig_mod."),
    "compiled layers": lambda k: k.replace("self_attn", "_orig_mod.self_attn"),
    "sharded": lambda k: k.replace("0.self", "0._fsdp_wrapped_module.self"),
    "no head": lambda k: k.replace(FRONT + "model.", FRONT),
    "no head, no front": lambda k: k.removeprefix(FRONT + "model."),
    "prefix twice": lambda k: k.replace(FRONT, FRONT + "model."),
    "all": lambda k: "module._orig_mod." + k.replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_means_the_same(tmp_path, name):
    want = ours.load(write(tmp_path / "plain", tensors()), CONFIG)
    arrays = respelled(SPELLINGS[name])
    assert set(arrays) != set(tensors())
    same(ours.load(write(tmp_path / "other", arrays), CONFIG), want)


@pytest.mark.parametrize(
    "key",
    [
        "model.norm.weight",
        "model.norm.modules_to_save.weight",
        "model.norm.modules_to_save.default.weight",
        "_orig_mod.model.norm.modules_to_save.other.weight",
    ],
)
def test_what_is_stored_whole(tmp_path, key):
    norm = np.arange(16, dtype=np.float32)
    arrays = tensors() | {FRONT + key: norm}
    if "other" in key:  # the frozen copy is in memory beside it
        arrays[FRONT + "model.norm.original_module.weight"] = norm + 1
    source = write(tmp_path, arrays, modules_to_save=["model.norm"])
    found = ours.load(source, CONFIG)
    np.testing.assert_array_equal(found["norm_out/scale"].value, norm)


FAMILIES = {
    "gpt2": (
        gpt2.Config(31, 16, 8, 2, 2, 32),
        "transformer.h.{}.attn.c_attn",
        ((2, 8), (24, 2)),
    ),
    "roberta": (
        roberta.Config("roberta", 31, 16, 2, 1, 16, 2, 4, 24),
        "roberta.encoder.layer.{}.attention.self.query",
        ((2, 16), (16, 2)),
    ),
    "bert": (
        roberta.Config("bert", 31, 16, 0, 2, 16, 2, 4, 24),
        "bert.encoder.layer.{}.attention.self.query",
        ((2, 16), (16, 2)),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_models_without_their_heads(tmp_path, family):
    config, module, shapes = FAMILIES[family]
    draw = np.random.default_rng(0).standard_normal
    plain = {
        f"{FRONT}{module.format(layer)}.lora_{x}.weight": draw(s).astype(np.float32)
        for layer in range(2)
        for x, s in zip("AB", shapes, strict=True)
    }
    fields = {"target_modules": [module.rpartition(".")[2]]}
    want = ours.load(write(tmp_path / "plain", plain, **fields), config)
    head = module.partition(".")[0] + "."
    for name, change in {
        "bare": lambda k: k.replace(head, "", 1),
        "twice": lambda k: k.replace(head, head + head, 1),
    }.items():
        arrays = {change(key): array for key, array in plain.items()}
        same(ours.load(write(tmp_path / name, arrays, **fields), config), want)


def both(*changes):
    return {change(key): a for change in changes for key, a in tensors().items()}


@pytest.mark.parametrize(
    "arrays, message",
    [
        (
            both(SPELLINGS["adapter's name"], SPELLINGS["another name"]),
            "v_proj.lora_A.default.weight' and .*my-lora_2.weight' are the same tensor",
        ),
        (both(lambda k: k, SPELLINGS["no front"]), "are the same tensor: keep one"),
        (
            {
                key.replace(".weight", f".{name}.weight"): array
                for (key, array), name in zip(tensors().items(), "xxyy", strict=True)
            },
            r"the adapters 'x' \(.*'y' \(.*save one of them.*selected_adapters",
        ),
        (
            respelled(lambda k: k.replace("model.layers", "decoder.blocks")),
            "names like 'decoder.blocks.0.self_attn.v_proj', .* under any prefix .*"
            "If not, write 'base_model.model.<module>.lora_A.weight'",
        ),
        (
            respelled(lambda k: k.replace(FRONT, FRONT + "teacher.")),
            "names like 'teacher.model.layers.0.self_attn.v_proj', .* under any prefix",
        ),
        (
            respelled(lambda k: k.replace("lora_A", "lora_down")),
            "lora_down.weight' is a name in kohya's form, not PEFT's; write 'base",
        ),
    ],
)
def test_what_is_not_clear_is_said(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=f"adapter_model.safetensors: .*{message}"):
        ours.load(write(tmp_path, arrays), CONFIG)


def test_a_block_that_encoder_and_decoder_both_have(tmp_path):
    config = t5.Config(31, 16, 2, 2, 4, 6, 24)
    key = FRONT + "block.0.layer.0.SelfAttention.q.lora_{}.weight"
    arrays = {key.format("A"): np.ones((2, 16), np.float32)}
    arrays[key.format("B")] = np.ones((24, 2), np.float32)
    source = write(tmp_path, arrays, target_modules=["q"])
    with pytest.raises(
        ValueError, match=r"could be in any of \['decoder', 'encoder'\]; write"
    ):
        ours.load(source, config)


# The real PEFT

needs_peft = pytest.mark.skipif(
    not hasattr(cases, "peft"), reason="needs the golden extra: torch, peft"
)


def lora(**fields):
    told = dict(r=2, lora_alpha=5, target_modules=["q_proj", "down_proj"])
    return cases.peft.LoraConfig(**told | fields)


@needs_peft
@pytest.mark.parametrize("dora", [False, True])
def test_the_state_dict_as_it_is_in_memory(tmp_path, dora):
    """`model.state_dict()`, with the adapter's name and frozen copies of layers."""
    config = lora(use_dora=dora, modules_to_save=["lm_head"])
    model = cases.adapted("llama", False, config)
    want = ours.load(
        cases.saved(model, str(tmp_path / "plain")), cases.own("llama", False)[0]
    )
    named = {k: v.numpy().copy() for k, v in model.state_dict().items()}
    keep = ("lora_", "base_layer", "modules_to_save", "original_module")
    arrays = {k: v for k, v in named.items() if any(word in k for word in keep)}
    assert any("base_layer" in k for k in arrays)
    safetensors.numpy.save_file(arrays, tmp_path / "plain" / ours.TENSORS)
    same(ours.load(tmp_path / "plain", cases.own("llama", False)[0]), want)


@needs_peft
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_automodel_of_peft_itself(tmp_path, family):
    """PEFT adapts the model without its head; its logits equal ours."""
    part = {"llama": "model", "gpt2": "transformer"}[family]
    targets = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"]}[family]
    whole = cases.fresh(family, False)
    config = lora(target_modules=targets, fan_in_fan_out=family == "gpt2")
    inner = cases.peft.get_peft_model(getattr(whole, part), config)
    generator = cases.torch.Generator().manual_seed(1)
    with cases.torch.no_grad():
        for p in inner.parameters():
            if p.requires_grad:
                p += 0.5 * cases.torch.randn(p.shape, generator=generator)
    inner.save_pretrained(tmp_path)
    keys = set(safetensors.numpy.load_file(tmp_path / ours.TENSORS))
    assert all(k.startswith((FRONT + "layers.", FRONT + "h.")) for k in keys)
    setattr(whole, part, inner)
    expected = cases.logits(whole)
    adapters = ours.load(tmp_path, cases.own(family, False)[0])
    cases.assert_same(cases.here(family, False, adapters), expected, family, False)


@needs_peft
@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_unknown_fields_that_switch_nothing_on(tmp_path, value):
    """PEFT ignores them, whatever they hold; here they must be off."""
    model = cases.adapted("llama", False, lora())
    expected = cases.logits(model)
    cases.saved(model, str(tmp_path))
    file = tmp_path / ours.CONFIG
    told = json.loads(file.read_text())
    file.write_text(json.dumps(told | {"use_something_new": value}))
    adapters = ours.load(tmp_path, cases.own("llama", False)[0])
    cases.assert_same(cases.here("llama", False, adapters), expected, "llama", False)
    with warnings.catch_warnings():  # about the unknown field
        warnings.simplefilter("ignore")
        base = cases.fresh("llama", False)
        again = cases.peft.PeftModel.from_pretrained(base, str(tmp_path))
    cases.golden.assert_same(cases.logits(again), expected)
    file.write_text(json.dumps(told | {"use_something_new": True}))
    with pytest.raises(ValueError, match="unknown fields.*use_something_new=True"):
        ours.load(tmp_path, cases.own("llama", False)[0])
