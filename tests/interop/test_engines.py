"""Adapters as written, against the rules of the engines that load them."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

import lorax
from lorax.interop import engines, hf, peft
from lorax.models import gpt2, llama, mixture

CONFIG = llama.Config(31, 64, 16, 2, 4, 2, 4, 24, tied=False)
OTHERS = ("vLLM", "SGLang", "llama.cpp")


def adapters(*targets, config=CONFIG, family=llama):
    """Perturbed adapters of a random model, and its parameters."""
    model = family.Model(config)
    draw = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: draw.standard_normal(s.shape, np.float32), hf.abstract(model)
    )
    forward = lambda params: model.apply({"params": params}, np.arange(4)[None])
    kernels = lorax.discover(forward, params)
    made, _ = lorax.init(jax.random.key(0), params, targets, kernels)
    return jax.tree.map(lambda x: x + 0.1, made), params


def verdicts(folder, config=CONFIG):
    return {verdict.engine: verdict for verdict in engines.check(folder, config)}


T = lorax.Target


def test_plain_lora_goes_everywhere(tmp_path):
    made, params = adapters(T("all-linear", rank=7))
    peft.save(tmp_path, made, CONFIG)
    found = verdicts(tmp_path)
    assert all(verdict.takes for verdict in found.values())
    assert found["vLLM"].flags == "--enable-lora --max-lora-rank=8"
    assert "--max-lora-rank=7 --lora-target-modules down_proj" in str(found["SGLang"])
    assert str(found["PEFT"]) == "PEFT: yes"


def test_names_are_what_the_loaders_split(tmp_path):
    """vLLM: two leading words, the module, lora_A or lora_B, weight."""
    made, _ = adapters(T("all-linear", rank=2), T("embed/embedding", rank=2))
    peft.save(tmp_path, made, CONFIG)
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        parts = name.split(".")
        assert parts[:2] == ["base_model", "model"]
        if parts[-1] == "weight":
            assert parts[-2] in ("lora_A", "lora_B")
            kind, module = parts[-2][-1], parts[2:-2]
        else:
            assert parts[-1] in ("lora_embedding_A", "lora_embedding_B")
            kind, module = parts[-1][-1], parts[2:-1]
        assert tensor.shape[0 if kind == "A" else 1] == 2
        assert module[-1] in engines.SGLANG_MODULES
        assert module[:2] == ["model", "layers"] or module[-1] == "embed_tokens"


# What there is besides plain factors, and a word of the reason.
BESIDE = {
    "use_dora": [T("layers/q/kernel", 2, adapter="dora")],
    "modules_to_save": [T("layers/q/kernel", 2), T("norm_out/scale", adapter="full")],
    "trainable_token_indices": [
        T("layers/q/kernel", 2),
        T("embed/embedding", adapter="rows", rows=(1, 2)),
    ],
    "peft_type": [T("layers/q/kernel", 2, adapter="adalora")],
}


@pytest.mark.parametrize("word", BESIDE)
def test_what_only_peft_reads(word, tmp_path):
    made, params = adapters(*BESIDE[word])
    peft.save(tmp_path, made, CONFIG, params=params)
    found = verdicts(tmp_path)
    assert found["PEFT"].takes
    for engine in OTHERS:
        assert any(word in reason for reason in found[engine].reasons), engine
        assert str(found[engine]).startswith(f"{engine}: no\n  ")


def test_biases(tmp_path):
    config = gpt2.Config(31, 16, 16, 2, 2, 24)
    made, _ = adapters(
        T("layers/up/kernel", 2),
        T("layers/up/bias", adapter="full"),
        config=config,
        family=gpt2,
    )
    peft.save(tmp_path, made, config)
    found = verdicts(tmp_path, config)
    for engine in OTHERS:
        assert "bias: " in str(found[engine])
    assert "not serve adapters for 'gpt2'" in str(found["vLLM"])
    assert "not support adapters of c_fc" in str(found["SGLang"])
    assert "writes GGUF adapters only for llama" in str(found["llama.cpp"])


def test_patterns_are_written_out(tmp_path):
    made, params = adapters(
        T("layers/q/kernel", rank=2, alpha=4),
        T("layers/v/kernel", rank=3, alpha=5),
    )
    peft.save(tmp_path / "own", made, CONFIG)
    found = verdicts(tmp_path / "own")
    for engine in ("vLLM", "SGLang"):
        assert "rank_pattern" in str(found[engine]) and "uniform=True" in str(
            found[engine]
        )
    assert found["llama.cpp"].takes
    peft.save(tmp_path / "one", made, CONFIG, uniform=True)
    assert all(verdict.takes for verdict in verdicts(tmp_path / "one").values())
    told = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert told["r"] == 3 and not told["rank_pattern"] and not told["alpha_pattern"]
    again = peft.load(tmp_path / "one", CONFIG)
    for path, leaf in lorax.tree.flatten(lorax.merge(again, params)).items():
        want = lorax.tree.flatten(lorax.merge(made, params))[path]
        np.testing.assert_allclose(leaf, want, atol=1e-5)
    ada, _ = adapters(T("layers/q/kernel", 2, adapter="adalora"))
    with pytest.raises(ValueError, match="not for adalora"):
        peft.save(tmp_path, ada, CONFIG, uniform=True)


def test_other_fields(tmp_path):
    made, _ = adapters(T("layers/q/kernel", rank=2))
    peft.save(tmp_path, made, CONFIG, rank_stabilized=True)
    found = verdicts(tmp_path)
    assert found["vLLM"].takes and "use_rslora" in str(found["SGLang"])
    file = tmp_path / "adapter_config.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps({**told, "r": 600, "target_modules": ".*q_proj"}))
    assert "largest is 512" in str(verdicts(tmp_path)["vLLM"])
    assert "not patterns" in str(verdicts(tmp_path)["SGLang"])
    file.write_text(json.dumps({**told, "layer_replication": [[0, 2]]}))
    assert "does not copy layers" in str(verdicts(tmp_path)["llama.cpp"])


def test_a_tied_embedding(tmp_path):
    config = llama.Config(31, 64, 16, 2, 4, 2, 4, 24, tied=True)
    made, _ = adapters(T("embed/embedding", rank=2), config=config)
    peft.save(tmp_path, made, config)
    assert "also the head" in str(verdicts(tmp_path, config)["llama.cpp"])


@pytest.mark.parametrize(
    "pattern, taken", [("(gate_up|down)", True), ("gate_up", False)]
)
def test_experts(pattern, taken, tmp_path):
    """A single kernel has the name that vLLM gives the other one."""
    config = mixture.Config(
        vocabulary=31,
        width=16,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=4,
        hidden=24,
        experts=4,
        chosen=2,
    )
    made, _ = adapters(
        T(f"layers/experts/{pattern}/kernel", rank=2), config=config, family=mixture
    )
    peft.save(tmp_path, made, config)
    found = verdicts(tmp_path, config)
    assert found["vLLM"].takes == taken
    assert taken or "could be mistaken for the other" in str(found["vLLM"])
    assert not found["SGLang"].takes and not found["llama.cpp"].takes
    with pytest.raises(ValueError, match="experts,; choose one rank"):
        peft.save(tmp_path, made, config, uniform=True)


def test_the_families_of_gguf():
    metadata = pytest.importorskip("lorax.interop.gguf.metadata")
    assert {*engines.GGUF_FAMILIES} == {*metadata.ARCHITECTURES, "mistral"}
