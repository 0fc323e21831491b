"""What PEFT's config can hold besides factors: biases, rows, replicated layers."""

import dataclasses
import json
import pathlib
import re
import warnings

import jax
import numpy as np
import pytest

import lorax
from lorax.adapters import Ia3
from lorax.interop import peft as ours
from lorax.interop import peft_config
from lorax.models import gpt2, llama, t5
from tests.interop import peft_cases as cases
from tests.models import golden

peft = pytest.importorskip("peft", reason="needs the golden extra")
pytestmark = pytest.mark.once
LORA = peft.LoraConfig

# name: (family, tied, what trains besides the factors, config)
CASES = {
    "lora_only": (
        "gpt2",
        True,
        {"layers/qkv/bias", "layers/down/bias"},
        LORA(r=2, target_modules=["c_attn", "mlp.c_proj"], bias="lora_only"),
    ),
    "all": (
        "gpt2",
        True,
        {
            *(f"layers/{m}/bias" for m in "qkv o up down norm_attn norm_mlp".split()),
            "norm_out/bias",
        },
        LORA(r=2, target_modules=["c_attn"], bias="all"),
    ),
    "all beside a module that is saved": (
        "gpt2",
        True,
        {
            *(f"layers/{m}/bias" for m in "qkv o up down norm_attn norm_mlp".split()),
            "norm_out/bias",
            "norm_out/scale",
        },
        LORA(r=2, target_modules=["c_fc"], bias="all", modules_to_save=["ln_f"]),
    ),
    "adalora": (
        "gpt2",
        True,
        {"layers/o/bias"},
        peft.AdaLoraConfig(
            init_r=2, target_modules=["attn.c_proj"], bias="lora_only", total_step=9
        ),
    ),
    "lora_bias": (
        "gpt2",
        True,
        {"layers/up/bias"},
        LORA(r=2, lora_alpha=3, target_modules=["c_fc"], lora_bias=True),
    ),
    "lora_bias and lora_only": (
        "gpt2",
        True,
        {"layers/up/bias"},
        LORA(r=2, target_modules=["c_fc"], lora_bias=True, bias="lora_only"),
    ),
    "rows, tied": (
        "llama",
        True,
        {"embed/embedding"},
        LORA(r=2, target_modules=["q_proj"], trainable_token_indices=[20, 3, 7]),
    ),
    "rows of gpt2, named": (
        "gpt2",
        True,
        {"embed/embedding"},
        LORA(r=2, target_modules=["c_fc"], trainable_token_indices={"wte": [0, 28]}),
    ),
    "rows, untied": (
        "llama",
        False,
        {"embed/embedding"},
        LORA(r=2, target_modules=["v_proj"], trainable_token_indices=[1]),
    ),
    "rows of a head too": (
        "llama",
        False,
        {"embed/embedding", "head/kernel"},
        LORA(
            r=2,
            target_modules=["v_proj"],
            trainable_token_indices={"embed_tokens": [4, 2], "lm_head": [2, 9, 28]},
        ),
    ),
    "rows of a tied pair, both named": (
        "llama",
        True,
        {"embed/embedding"},
        LORA(
            r=2,
            target_modules=["v_proj"],
            trainable_token_indices={"embed_tokens": [4, 2], "lm_head": [4, 2]},
        ),
    ),
}


COMBINED = {  # combines what the other cases show one by one
    "all",
    "lora_bias and lora_only",
    "rows of gpt2, named",
    "rows, untied",
    "rows of a tied pair, both named",
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in COMBINED)) for n in CASES],
)
def test_both_ways(name, tmp_path):
    family, tied, beside, config = CASES[name]
    model = cases.adapted(family, tied, config)
    cases.saved(model, tmp_path / "theirs")
    expected = cases.logits(model)
    model_config, params, _ = cases.own(family, tied)
    adapters = ours.load(tmp_path / "theirs", model_config, params)
    others = {
        p for p, a in adapters.items() if not hasattr(a, "a") and "lam" not in a.roles
    }
    assert others == beside
    cases.assert_same(cases.here(family, tied, adapters), expected, family, tied)
    ours.save(tmp_path / "ours", adapters, model_config, params=params)
    back = cases.in_peft(family, tied, tmp_path / "ours")
    cases.assert_same(back, expected, family, tied)


def test_copies_of_layers(tmp_path):
    """PEFT's copies share weights; the base that we make holds real copies."""
    ranges = [[0, 2], [1, 3], [2, 3]]  # 0 1 1 2 2
    config = LORA(
        r=2,
        lora_alpha=4,
        target_modules=["q_proj", "down_proj"],
        layer_replication=ranges,
        layers_to_transform=[1, 2, 4],
    )
    model = cases.adapted("llama", False, config)
    cases.saved(model, tmp_path / "theirs")
    expected = cases.logits(model)
    short, params, _ = cases.own("llama", False)
    with pytest.raises(ValueError, match=r"with 5 layers .* has 3; .*replicate_layers"):
        ours.load(tmp_path / "theirs", short, params)
    config, copied = ours.replicate_layers(short, params, ranges)
    adapters = ours.load(tmp_path / "theirs", config, copied)
    assert adapters["layers/q/kernel"].layers == (1, 2, 4)
    merged = lorax.merge(adapters, copied)
    found = llama.Model(config).apply({"params": merged}, cases.TOKENS)
    golden.assert_same(found, expected)
    mixed = jax.tree.map(lambda x: x[::-1], copied["layers"])
    wrong = {**copied, "layers": mixed}
    with pytest.raises(ValueError, match="layers 1 and 2 are equal, but here 'layers/"):
        ours.load(tmp_path / "theirs", config, wrong)

    fields = {"layer_replication": ranges}
    with pytest.raises(ValueError, match="makes a model with 5 layers"):
        ours.save(tmp_path / "no", {}, short, fields=fields)
    ours.save(tmp_path / "ours", adapters, config, fields=fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = peft.PeftModel.from_pretrained(
            cases.fresh("llama", False), tmp_path / "ours"
        )
    golden.assert_same(cases.logits(back), expected)


def test_layers_that_are_no_stack():
    config, params, _ = cases.own("llama", False, scan=False)
    taken, copied = ours.replicate_layers(config, params, [(1, 3), (0, 1)])
    assert taken.layers == 3 and set(copied) == set(params)
    assert copied["layers_2"] is not params["layers_2"]
    np.testing.assert_array_equal(
        copied["layers_2"]["q"]["kernel"], params["layers_0"]["q"]["kernel"]
    )
    with pytest.raises(ValueError, match=r"select layers \[2, 3\], .* has 3"):
        ours.replicate_layers(config, params, [(2, 4)])
    with pytest.raises(ValueError, match="the stacks .* supports only one"):
        ours.replicate_layers(t5.Config(), params, [(0, 1)])


def refused(name, change, message, folder, params=True):
    """Asserts that a PEFT case with a changed config does not load."""
    family, tied, _, config = CASES[name]
    cases.saved(cases.adapted(family, tied, config), folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    base_config, own, _ = cases.own(family, tied)
    with pytest.raises(ValueError, match=message):
        ours.load(folder, base_config, own if params else None)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("lora_only", {"bias": "none"}, "bias': modules_to_save does not name it"),
        ("lora_only", {"bias": "all"}, "bias='all', .* was trained"),
        ("lora_only", {"bias": "some"}, "bias='some' is not implemented"),
        ("lora_bias", {"lora_bias": False}, "c_fc.lora_B.bias'"),
        ("lora_bias", {"use_dora": True}, "needs plain LoRA"),
        ("rows, tied", {"trainable_token_indices": [1, 2, 2]}, "names a token twice"),
        (
            "rows, tied",
            {"trainable_token_indices": [1, 2, 29]},
            "has 29 rows; .*resize",
        ),
        ("rows, tied", {"trainable_token_indices": [1, 2]}, r"require \[2, 16\]"),
        ("rows, tied", {"trainable_token_indices": None}, "does not name it"),
        ("rows, tied", {"trainable_token_indices": {"x": [1]}}, "names 'x', .*no such"),
        ("rows, tied", {"trainable_token_indices": [1.5]}, "must be"),
        (
            "rows, tied",
            {"trainable_token_indices": {"lm_head": [20, 3, 7]}},
            "tied to 'model.embed_tokens', but not the same rows.*tied=False",
        ),
        ("rows, tied", {"layer_replication": [[2, 1]]}, "not a list of pairs"),
    ],
)
def test_what_is_refused(name, change, message, tmp_path):
    refused(name, change, message, tmp_path)


@pytest.mark.parametrize("name", ["rows, tied", "lora_bias"])
def test_what_needs_the_base(name, tmp_path):
    refused(name, {}, "pass the base's parameters to peft.load", tmp_path, False)


def test_a_bias_that_b_adds_where_there_is_none(tmp_path):
    config = LORA(r=2, target_modules=["q_proj"], lora_bias=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases.saved(cases.adapted("llama", False, config), tmp_path)
    base_config, params, _ = cases.own("llama", False)
    with pytest.raises(ValueError, match="has no bias in this base.*lora_bias=False"):
        ours.load(tmp_path, base_config, params)


def made(*targets):
    config, params, run = cases.own("gpt2", True)
    forward = lambda params: gpt2.Model(config).apply({"params": params}, cases.TOKENS)
    kernels = lorax.discover(forward, params)
    adapters, _ = lorax.init(jax.random.key(0), params, targets, kernels)
    return config, params, adapters


def test_what_peft_has_no_word_for(tmp_path):
    full = lambda pattern: lorax.Target(pattern, adapter="full")
    config, _, adapters = made(lorax.Target("layers/(o|up)/kernel"), full(".*/up/bias"))
    with pytest.raises(ValueError, match="make .'layers/o/bias'. Full too, or no"):
        ours.save(tmp_path, adapters, config)
    config, _, adapters = made(lorax.Target("layers/o/kernel"), full(".*/up/bias"))
    with pytest.raises(ValueError, match=r"or all biases \(bias='all'\): make .*norm_"):
        ours.save(tmp_path, adapters, config)
    rows = lorax.Target("embed/embedding", adapter="rows", rows=(1,))
    config, _, adapters = made(lorax.Target("layers/o/kernel"), rows)
    with pytest.raises(ValueError, match="PEFT stores the rows themselves.*params="):
        ours.save(tmp_path, adapters, config)
    config, params, adapters = made(lorax.Target(".*up/kernel", adapter="ia3"), rows)
    gains = Ia3(adapters["layers/up/kernel"].axes, input_gain=np.ones((3, 16)))
    adapters = {**adapters, "layers/up/kernel": gains}
    with pytest.raises(ValueError, match="IA3 stores no biases and no rows"):
        ours.save(tmp_path, adapters, config, params=params)


def test_the_page_says_of_every_field_what_the_code_does():
    page = pathlib.Path(__file__).parents[2] / "docs" / "howto" / "peft_fields.md"
    told = {}
    for row in re.findall(r"^\| (`.*) \| (.*) \|$", page.read_text(), re.M):
        for field in re.findall(r"`(\w+)`", row[0]):
            assert field not in told, f"{field} twice"
            told[field] = row[1].split()[0].strip(":;,")
    assert set(told) == {f.name for f in dataclasses.fields(LORA)}
    for field, word in told.items():
        assert (word == "refused") == (field in peft_config.DEFAULTS), field
        if word == "read":
            assert field in peft_config.IMPLEMENTED, field
        if word == "harmless":
            assert field in peft_config.HARMLESS | {"peft_type"}, field


@pytest.mark.parametrize(
    "tied, modules", [(True, None), (False, ["lm_head", "embed_tokens"])]
)
def test_rows_alone_are_a_type_of_their_own(tied, modules, tmp_path):
    config = peft.TrainableTokensConfig(token_indices=[7, 2], target_modules=modules)
    model = cases.adapted("llama", tied, config)
    cases.saved(model, tmp_path / "theirs")
    expected = cases.logits(model)
    base_config, params, _ = cases.own("llama", tied)
    adapters = ours.load(tmp_path / "theirs", base_config, params)
    assert {a.rows for a in adapters.values()} == {(2, 7)}
    assert len(adapters) == (1 if tied else 2)
    cases.assert_same(cases.here("llama", tied, adapters), expected, "llama", tied)
    ours.save(tmp_path / "ours", adapters, base_config, params=params)
    back = cases.in_peft("llama", tied, tmp_path / "ours")
    cases.assert_same(back, expected, "llama", tied)
    told = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    file = tmp_path / "ours" / "adapter_config.json"
    file.write_text(json.dumps({**told, "token_indices": [2, 2]}))
    with pytest.raises(ValueError, match="token_indices=.* names a token twice"):
        ours.load(tmp_path / "ours", base_config, params)
    file.write_text(json.dumps({**told, "target_modules": ".*"}))
    with pytest.raises(ValueError, match="is a pattern; give a list"):
        ours.load(tmp_path / "ours", base_config, params)
    with pytest.raises(ValueError, match="fields=.'r'.: PEFT's TRAINABLE_TOKENS"):
        ours.save(tmp_path, adapters, base_config, params=params, fields={"r": 1})
    if not tied:
        head = adapters["head/kernel"].replace(rows=(1, 7))
        with pytest.raises(ValueError, match="one list of tokens"):
            ours.save(
                tmp_path, {**adapters, "head/kernel": head}, base_config, params=params
            )
