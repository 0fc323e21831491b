"""PEFT's adapters give PEFT's logits here; written back, they give them in PEFT."""

import numpy as np
import pytest

from lorax.interop import peft as ours
from tests.interop import peft_cases as cases

peft = pytest.importorskip("peft", reason="needs the golden extra")
LORA, ADALORA = peft.LoraConfig, peft.AdaLoraConfig

# name: (family, tied, class of our adapters, config)
CASES = {
    "gpt2 fused": ("gpt2", True, "Lora", LORA(r=2, target_modules=["c_attn"])),
    "every linear": (
        "gpt2",
        True,
        "Lora",
        LORA(r=2, lora_alpha=3, target_modules="all-linear"),
    ),
    "rslora": (
        "llama",
        False,
        "Lora",
        LORA(r=3, lora_alpha=4, target_modules=["q_proj", "o_proj"], use_rslora=True),
    ),
    "regex": (
        "llama",
        False,
        "Lora",
        LORA(r=2, target_modules=r"model\.layers\.(0|2)\..*(q|v|down)_proj"),
    ),
    "patterns": (
        "llama",
        False,
        "Lora",
        LORA(
            r=2,
            lora_alpha=4,
            target_modules=["q_proj", "k_proj", "up_proj"],
            rank_pattern={"layers.1.self_attn.q_proj": 4, "^.*up_proj": 3},
            alpha_pattern={r"layers.(0|2).*q_proj": 7, "k_proj": 1},
        ),
    ),
    "layers": (
        "gpt2",
        True,
        "Lora",
        LORA(
            r=2,
            target_modules=["c_fc", "attn.c_proj"],
            exclude_modules=["h.2.mlp.c_fc"],
            layers_to_transform=[0, 2],
            layers_pattern="h",
        ),
    ),
    "dora": (
        "gpt2",
        True,
        "Dora",
        LORA(r=2, target_modules=["c_attn", "c_proj"], use_dora=True),
    ),
    "dora of all kinds": (
        "llama",
        False,
        "Dora",
        LORA(
            r=2,
            target_modules=["q_proj", "o_proj", "embed_tokens", "lm_head"],
            rank_pattern={"1.self_attn.q_proj": 3},
            use_dora=True,
        ),
    ),
    "embedding and saved": (
        "gpt2",
        False,
        "Lora",
        LORA(
            r=2,
            target_modules=["wte", "wpe", "c_fc"],
            modules_to_save=["lm_head", "ln_f", "ln_1"],
        ),
    ),
    "saved embedding": (
        "llama",
        False,
        "Lora",
        LORA(r=2, target_modules=["gate_proj"], modules_to_save=["embed_tokens"]),
    ),
    "tied": (
        "llama",
        True,
        "Lora",
        LORA(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True),
    ),
    "tied and saved": (
        "llama",
        True,
        "Lora",
        LORA(
            r=2,
            target_modules=["v_proj"],
            modules_to_save=["embed_tokens"],
            ensure_weight_tying=True,
        ),
    ),
    "adalora": (
        "gpt2",
        True,
        "AdaLora",
        ADALORA(init_r=3, lora_alpha=5, target_modules=["c_attn"], total_step=10),
    ),
    "adalora with head": (
        "llama",
        False,
        "AdaLora",
        ADALORA(init_r=3, target_modules=["q_proj", "lm_head"], total_step=10),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_both_ways(name, tmp_path):
    family, tied, kind, config = CASES[name]
    model = cases.adapted(family, tied, config)
    cases.saved(model, tmp_path / "theirs")
    expected = cases.logits(model)

    model_config, params, _ = cases.own(family, tied)
    adapters = ours.load(tmp_path / "theirs", model_config, params)
    found = {type(a).__name__ for a in adapters.values()} - {"Full"}
    assert found == {kind}
    cases.assert_same(cases.here(family, tied, adapters), expected, family, tied)

    ours.save(tmp_path / "ours", adapters, model_config, base_name="nowhere/base")
    back = cases.in_peft(family, tied, tmp_path / "ours")
    cases.assert_same(back, expected, family, tied)
    again = ours.load(tmp_path / "ours", model_config, params)
    assert set(again) == set(adapters)
    for path, adapter in adapters.items():
        assert getattr(again[path], "layers", None) == getattr(adapter, "layers", None)
        for field in adapter.roles:
            np.testing.assert_allclose(
                getattr(again[path], field), getattr(adapter, field), rtol=1e-5
            )


@pytest.mark.parametrize("name", ["patterns", "layers"])
def test_without_scan(name, tmp_path):
    family, tied, _, config = CASES[name]
    model = cases.adapted(family, tied, config)
    cases.saved(model, tmp_path / "theirs")
    model_config, _, _ = cases.own(family, tied, scan=False)
    adapters = ours.load(tmp_path / "theirs", model_config)
    found = cases.here(family, tied, adapters, scan=False)
    cases.assert_same(found, cases.logits(model), family, tied)
    ours.save(tmp_path / "ours", adapters, model_config)
    back = cases.in_peft(family, tied, tmp_path / "ours")
    cases.assert_same(back, cases.logits(model), family, tied)
