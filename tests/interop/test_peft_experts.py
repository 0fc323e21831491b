"""PEFT's target_parameters on Mixtral and Qwen3-MoE: its logits here, ours there."""

import copy
import functools
import json
import tempfile
import warnings

import jax
import numpy as np
import pytest

import lorax
from lorax.interop import hf
from lorax.interop import peft as ours
from tests.interop import peft_cases as cases
from tests.models import golden

peft = pytest.importorskip("peft", reason="needs the golden extra")
transformers = pytest.importorskip("transformers", reason="needs the golden extra")
pytestmark = pytest.mark.once
SIZES = dict(
    vocab_size=29,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=16,
    num_experts_per_tok=2,
    experts_implementation="eager",  # the one that runs in float64
)


@functools.cache
def base(family):
    if family == "mixtral":
        config = transformers.MixtralConfig(
            intermediate_size=24, num_local_experts=4, **SIZES
        )
        model = transformers.MixtralForCausalLM(config)
    else:
        config = transformers.Qwen3MoeConfig(
            moe_intermediate_size=24,
            intermediate_size=20,
            num_experts=4,
            head_dim=4,
            **SIZES,
        )
        model = transformers.Qwen3MoeForCausalLM(config)
    return golden.redraw(model, size=1.5)


def fresh(family):
    return copy.deepcopy(base(family)).eval()


@functools.cache
def own(family, scan=True):
    with tempfile.TemporaryDirectory() as folder:
        base(family).save_pretrained(folder)
        model, params = hf.load(folder, scan=scan)
    return model, params, jax.jit(lambda p: model.apply({"params": p}, cases.TOKENS))


def lora(**fields):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.LoraConfig(**{"r": 2, "lora_alpha": 3, **fields})


# name: (family, config, adapted leaves)
GATE_UP, DOWN = (f"layers/experts/{name}/kernel" for name in ("gate_up", "down"))
CASES = {
    "both, beside attention": (
        "mixtral",
        lora(
            target_modules=["q_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        ),
        {"layers/q/kernel", GATE_UP, DOWN},
    ),
    "one": ("qwen3", lora(target_modules=[], target_parameters=["down_proj"]), {DOWN}),
    "a router, patterns": (
        "mixtral",
        lora(
            target_modules=["v_proj"],
            target_parameters=["gate_up_proj", "mlp.gate.weight"],
            rank_pattern={"1.mlp.experts.gate_up_proj": 3, "gate.weight": 1},
            alpha_pattern={"2.mlp.experts.gate_up_proj": 5},
            use_rslora=True,
        ),
        {"layers/v/kernel", GATE_UP, "layers/router/kernel"},
    ),
    "some layers": (
        "qwen3",
        lora(
            target_modules=["q_proj"],
            target_parameters=[
                "layers.0.mlp.experts.gate_up_proj",
                "layers.2.mlp.experts.gate_up_proj",
                "layers.2.mlp.experts.down_proj",
            ],
        ),
        {"layers/q/kernel", GATE_UP, DOWN},
    ),
}


def perturbed(family, config):
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(fresh(family), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn(p.shape, generator=generator)
    return model.eval()


def loaded(family, folder):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(fresh(family), folder)
    heard = [str(w.message) for w in told]
    assert not [m for m in heard if "missing" in m or "unexpected" in m.lower()], heard
    return model


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "one")) for n in CASES]
)
def test_both_ways(name, tmp_path):
    family, config, leaves = CASES[name]
    theirs = cases.saved(perturbed(family, config), tmp_path / "theirs")
    expected = cases.logits(loaded(family, theirs))
    model, params, run = own(family)
    adapters = ours.load(theirs, model.config)
    assert adapters.keys() == leaves
    golden.assert_same(run(lorax.merge(adapters, params)), expected)
    golden.assert_apart(cases.logits(fresh(family)), expected)
    forward = lambda params: model.apply({"params": params}, cases.TOKENS)
    adapted = jax.jit(lorax.adapt(forward))(adapters, params)
    golden.assert_same(adapted, expected)

    ours.save(tmp_path / "ours", adapters, model.config)
    golden.assert_same(cases.logits(loaded(family, tmp_path / "ours")), expected)


def test_what_peft_merges(tmp_path):
    family, config, _ = CASES["both, beside attention"]
    theirs = cases.saved(perturbed(family, config), tmp_path / "theirs")
    merged = loaded(family, theirs).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    _, want = hf.load(tmp_path / "merged")
    model, params, _ = own(family)
    found = lorax.merge(ours.load(theirs, model.config), params)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
    jax.tree.map(close, found, want)


@pytest.mark.slow
def test_layers_that_are_leaves_of_their_own(tmp_path):
    family, config, _ = CASES["some layers"]
    theirs = cases.saved(perturbed(family, config), tmp_path / "theirs")
    expected = cases.logits(loaded(family, theirs))
    model, params, run = own(family, scan=False)
    adapters = ours.load(theirs, model.config)
    assert adapters["layers_2/experts/down/kernel"].a.shape == (4, 24, 2)
    golden.assert_same(run(lorax.merge(adapters, params)), expected)
    ours.save(tmp_path / "ours", adapters, model.config)
    golden.assert_same(cases.logits(loaded(family, tmp_path / "ours")), expected)


def test_adapters_made_here(tmp_path):
    model, params, run = own("mixtral")
    forward = lambda params: model.apply({"params": params}, cases.TOKENS)
    kernels = lorax.discover(forward, params)
    adapters, _ = lorax.init(jax.random.key(0), params, ("all-linear", 2), kernels)
    draw = np.random.default_rng(0)
    moved = lambda x: x + 0.1 * draw.standard_normal(x.shape, np.float32)
    adapters = jax.tree.map(moved, adapters)
    assert {GATE_UP, DOWN, "layers/router/kernel"} <= adapters.keys()
    ours.save(tmp_path, adapters, model.config)
    expected = run(lorax.merge(adapters, params))
    found = cases.logits(loaded("mixtral", tmp_path))
    golden.assert_same(expected, found)

    dropped = {GATE_UP: adapters[GATE_UP].replace(dropout=0.1)}
    with pytest.raises(ValueError, match="have no dropout, .*dropout=0.1"):
        ours.save(tmp_path, dropped, model.config)
    router = {p: adapters[p].replace(dropout=0.1) for p in ["layers/router/kernel"]}
    with pytest.raises(ValueError, match="do not allow lora_dropout"):
        ours.save(tmp_path, router, model.config)
    wrong = adapters[DOWN]
    wrong = wrong.replace(
        a=np.zeros((3, 24, 2)),
        b=np.zeros((3, 2, 4, 16)),
        axes=lorax.Axes((2,), (1, 3), (0,)),
    )
    with pytest.raises(ValueError, match="a pair for each expert, but the adapter has"):
        ours.save(tmp_path, {DOWN: wrong}, model.config)
    target = lorax.Target("layers/experts/down/kernel", rank=2, adapter="dora")
    dora, _ = lorax.init(jax.random.key(0), params, target, kernels)
    with pytest.raises(ValueError, match="only with plain Lora .*and this is dora"):
        ours.save(tmp_path, dora, model.config)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"target_parameters": ["gate_up_proj"]}, "base_layer.lora_A.weight'"),
        ({"target_parameters": ["x.y"]}, "names 'x.y', but the base has no such"),
        ({"r": 3}, r"shape \[8, 24\], but rank 3 with 4 experts requires \[12, 24\]"),
        ({"use_dora": True}, "needs plain LoRA"),
        ({"target_parameters": None}, "target_parameters does not name its parameter"),
    ],
)
def test_what_is_refused(change, message, tmp_path):
    family, config, _ = CASES["both, beside attention"]
    if "r" in change:
        change = {**change, "rank_pattern": {"q_proj": 2, "gate_up_proj": 2}}
    cases.saved(perturbed(family, config), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        ours.load(tmp_path, own(family)[0].config)
