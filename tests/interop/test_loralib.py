"""Checkpoints of loralib: the authors' own, and MergedLinear from its equations."""

import functools
import os
import pathlib

import numpy as np
import pytest
import safetensors.numpy

import lorax
from lorax.interop import hf, loralib
from lorax.models import gpt2, roberta

DATA = pathlib.Path(os.environ.get("LORAX_DATA", "../shared/data"))
MNLI = DATA / "roberta_lora_mnli" / "roberta_base_lora_mnli.safetensors"
SMALL = gpt2.Config(31, 16, 8, 2, 2, 32)
Q = "transformer.h.{}.attn.c_attn.lora_{}"


@pytest.mark.skipif(not MNLI.exists(), reason="needs the data in LORAX_DATA")
def test_the_authors_mnli_adapter():
    config = roberta.Config(labels=3)
    adapters = loralib.load(MNLI, config, alpha=16)
    assert set(adapters) == {
        "layers/q/kernel",
        "layers/v/kernel",
        *(f"classifier_{n}/{x}" for n in ("dense", "out") for x in ("kernel", "bias")),
    }
    raw = safetensors.numpy.load_file(MNLI)
    lora = adapters["layers/v/kernel"]
    assert lora.scale == 2 and lora.a.shape == (12, 768, 8)
    front = "roberta.encoder.layer.7.attention.self.value.lora_"
    want = 2 * raw[front + "B"].astype(np.float64) @ raw[front + "A"]
    found = 2 * np.asarray(lora.a[7]) @ np.asarray(lora.b[7]).reshape(8, 768)
    np.testing.assert_allclose(found.T, want, atol=1e-6)
    out = adapters["classifier_out/kernel"].value
    np.testing.assert_array_equal(out, raw["classifier.out_proj.weight"].T)
    shapes = hf.abstract(roberta.Model(config))
    for path, adapter in adapters.items():
        first, second = path.split("/")[0], path.split("/")[1:]
        leaf = shapes[first]
        for name in second:
            leaf = leaf[name]
        adapter.check(path, leaf)


def merged(rank=2, width=8, blocks=2):
    draw = np.random.default_rng(0)
    sizes = {"A": (blocks * rank, 8), "B": (blocks * width, rank)}
    return {
        Q.format(layer, x): draw.standard_normal(sizes[x]).astype(np.float32)
        for layer in range(2)
        for x in "AB"
    }


def test_merged_linear(tmp_path):
    raw = merged()
    safetensors.numpy.save_file(raw, tmp_path / "x.safetensors")
    adapters = loralib.load(
        tmp_path / "x.safetensors", SMALL, alpha=32, merged=(True, False, True)
    )
    lora = adapters["layers/qkv/kernel"]
    assert lora.scale == 16 and lora.rank == 4
    kernel = np.zeros((2, 8, 3, 2, 4), np.float32)
    delta = np.asarray(
        lorax.merge(adapters, {"layers": {"qkv": {"kernel": kernel}}})["layers"]["qkv"][
            "kernel"
        ]
    )
    for layer in range(2):
        a, b = (raw[Q.format(layer, x)].astype(np.float64) for x in "AB")
        q, v = 16 * b[:8] @ a[:2], 16 * b[8:] @ a[2:]
        np.testing.assert_allclose(delta[layer, :, 0].reshape(8, 8).T, q, atol=1e-4)
        np.testing.assert_array_equal(delta[layer, :, 1], 0)
        np.testing.assert_allclose(delta[layer, :, 2].reshape(8, 8).T, v, atol=1e-4)


@pytest.mark.parametrize(
    "edit, kwargs, message",
    [
        ({}, {}, "as merged="),
        ({}, {"merged": (True, True, True)}, r"requires \(6, 8\) and \(24, 2\)"),
        ({"x.lora_A": (2, 8)}, {"merged": (1, 0, 1)}, "base model has no leaf 'x'"),
        (
            {"transformer.h.1.mlp.c_fc.lora_A": (2, 8)},
            {"merged": (1, 0, 1)},
            "file has no leaf .*c_fc.lora_B",
        ),
        (
            {"transformer.ln_f.bias": (9,)},
            {"merged": (1, 0, 1)},
            r"is \(9,\), not \(8,\)",
        ),
        (
            {"transformer.wte.lora_A": (2, 31), "transformer.wte.lora_B": (8, 2)},
            {"merged": (1, 0, 1)},
            "tied=False",
        ),
    ],
)
def test_what_is_refused(edit, kwargs, message, tmp_path):
    raw = merged() | {k: np.ones(s, np.float32) for k, s in edit.items()}
    safetensors.numpy.save_file(raw, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        loralib.load(tmp_path / "x.safetensors", SMALL, alpha=1, **kwargs)
    assert "x.safetensors" in str(error.value)


@pytest.mark.parametrize(
    "a, b, message",
    [
        (
            np.ones((0, 8)),
            np.ones((24, 0)),
            r"c_fc.lora_B' has shape \(24, 0\); its last",
        ),
        (np.ones((2, 8)), np.ones(()), r"c_fc.lora_B' has shape \(\); its last axis"),
        (np.ones(16), np.ones(64), r"have shapes \(16,\) and \(64,\)"),
        (np.ones((2, 8), int), np.ones((32, 2)), "c_fc.lora_A' has dtype int64, not"),
    ],
)
def test_factors_that_are_none(a, b, message, tmp_path):
    front = "transformer.h.0.mlp.c_fc.lora_"
    safetensors.numpy.save_file(
        {front + "A": a, front + "B": b}, tmp_path / "x.safetensors"
    )
    with pytest.raises(ValueError, match=f"x.safetensors: .*{message}"):
        loralib.load(tmp_path / "x.safetensors", SMALL, alpha=1)


def test_two_names_of_one_tensor_and_impossible_arguments(tmp_path):
    raw = {k: np.ones(8, np.float32) for k in ("ln_f.bias", "transformer.ln_f.bias")}
    safetensors.numpy.save_file(raw, tmp_path / "x.safetensors")
    load = functools.partial(loralib.load, tmp_path / "x.safetensors", SMALL)
    with pytest.raises(ValueError, match="'transformer.ln_f.bias' and 'ln_f.bias' n"):
        load(alpha=1)
    with pytest.raises(ValueError, match="alpha=nan; it must be a number"):
        load(alpha=float("nan"))
    with pytest.raises(ValueError, match="dropout=1; it must be a number >= 0 and < 1"):
        load(alpha=1, dropout=1)
    with pytest.raises(ValueError, match=r"merged=\(\) adapts no block"):
        load(alpha=1, merged=())


def test_pickles_are_never_read(tmp_path):
    with pytest.raises(ValueError, match="is a pickle"):
        loralib.load(tmp_path / "roberta_base_lora_mnli.bin", SMALL, alpha=1)
