"""What GGUF's keys say about a model, by llama.cpp's names and rules."""

import math

import numpy as np
import pytest

from lorax.interop import gguf
from lorax.interop.gguf import header, metadata
from lorax.interop.gguf.blocks import Type
from tests.interop import gguf_files as made

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def held():
    return made.tensors(lambda name: Type.Q8_0)


def config_of(path, held, *args, **kwargs):
    made.write(path / "x.gguf", held, *args, **kwargs)
    return metadata.config(header.read(path / "x.gguf"))


def test_the_sizes(tmp_path, held):
    told = {"llama.rope.freq_base": 5e5, "llama.rope.dimension_count": 64}
    told |= {"llama.vocab_size": made.VOCABULARY, "llama.attention.causal": True}
    config = config_of(tmp_path, held, metadata=told)
    assert (config.layers, config.width, config.hidden) == (2, 256, 256)
    assert (config.heads, config.kv_heads, config.head_dim) == (4, 2, 64)
    assert (config.vocabulary, config.positions) == (made.VOCABULARY, 64)
    assert config.eps == 1e-5 and config.rope.base == 5e5 and config.tied
    assert not (config.qkv_bias or config.mlp_bias or config.qk_norm)


def test_biases_norms_and_a_head_are_seen(tmp_path):
    many = made.tensors(lambda name: Type.Q8_0, tied=False, normed=True, biased=True)
    config = config_of(tmp_path, many, "qwen3")
    assert config.model_type == "qwen3" and config.qk_norm and not config.tied
    config = config_of(tmp_path, many, "qwen2")
    assert config.model_type == "qwen2" and config.qkv_bias and not config.o_bias


def test_stretched_positions(tmp_path, held):
    scaling = {"type": "linear", "factor": 4.0}
    told = {f"llama.rope.scaling.{key}": value for key, value in scaling.items()}
    rope = config_of(tmp_path, held, metadata=told).rope
    np.testing.assert_allclose(rope.rates(64), 1e4 ** (-np.arange(0, 64, 2) / 64) / 4)
    scaling = {"type": "yarn", "factor": 4.0, "original_context_length": 16}
    told = {f"llama.rope.scaling.{key}": value for key, value in scaling.items()}
    rope = config_of(tmp_path, held, metadata=told).rope
    assert (rope.kind, rope.factor, rope.original) == ("yarn", 4.0, 16)
    assert (rope.low, rope.high) == (1.0, 32.0)
    assert rope.gain == pytest.approx(1 + 0.1 * math.log(4))
    told["llama.rope.scaling.type"] = "none"
    assert config_of(tmp_path, held, metadata=told).rope.kind == "default"


def llama3(factor, original=8192, base=5e5, size=64):
    """Factors as llama.cpp's converter writes them."""
    found = []
    for i in range(0, size, 2):
        wave = 2 * math.pi * base ** (i / size)
        smooth = (original / wave - 1) / 3
        own = 1 / ((1 - smooth) / factor + smooth)
        own = 1 if wave < original / 4 else factor if wave > original else own
        found.append(own)
    return np.array(found, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_factors_of_llama_3(tmp_path, held, factor):
    factors = llama3(factor)
    many = held | {"rope_freqs.weight": (Type.F32, factors)}
    told = {"llama.rope.freq_base": 5e5}
    rope = config_of(tmp_path, many, metadata=told).rope
    assert (rope.kind, rope.factor, rope.original) == ("llama3", factor, 8192)
    want = 5e5 ** (-np.arange(0, 64, 2) / 64) / factors
    np.testing.assert_allclose(rope.rates(64), want, rtol=1e-6)
    made.write(tmp_path / "x.gguf", many, metadata=told)
    model, params = gguf.load(tmp_path / "x.gguf")
    assert model.config.rope == rope and "rope_freqs" not in str(params.keys())


@pytest.mark.parametrize(
    ("factors", "more", "message"),
    [
        (llama3(8.0, 4096), {}, "not hold the factors of Llama 3.*hf.load"),
        (-llama3(8.0), {}, "not hold the factors"),
        (llama3(8.0)[:-1], {}, r"is F32 \[31\], not F32 \[32\]"),
        (llama3(8.0).astype(np.float16), {}, r"is F16 \[32\], not F32"),
        (
            llama3(8.0),
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
            "combined with rope.scaling.type='linear'",
        ),
    ],
)
def test_other_factors_are_refused(tmp_path, held, factors, more, message):
    many = held | {"rope_freqs.weight": (Type.F32, factors)}
    told = {"llama.rope.freq_base": 5e5} | more
    with pytest.raises(ValueError, match=f"x.gguf: 'rope_freqs.weight' .*{message}"):
        config_of(tmp_path, many, metadata=told)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"general.type": "adapter"}, "general.type='adapter', but this loads models"),
        ({"general.type": "mmproj"}, "general.type='mmproj', but this loads models"),
        ({"split.count": 3}, "split.count=3, .*llama-gguf-split --merge"),
        ({"llama.block_count": None}, "there is no 'llama.block_count' in the metad"),
        ({"llama.block_count": "2"}, "llama.block_count='2'; it must be an int >= 1"),
        ({"llama.block_count": 3}, "no tensor 'blk.2.attn_q.weight', .*block_count=3"),
        ({"llama.block_count": 10**5}, "llama.block_count=100000; it must be an int"),
        ({"llama.block_count": 1}, "left over: blk.1.attn_k.weight, .* and 4 more"),
        (
            {"llama.attention.head_count": 3},
            "head_count_kv=2 does not divide llama.att",
        ),
        ({"llama.attention.head_count": [4, 4]}, r"head_count=\[4, 4\]; it must be an"),
        (
            {
                "llama.attention.head_count": 2**31 - 1,
                "llama.attention.head_count_kv": 1,
            },
            "llama.attention.head_count=2147483647 does not divide",
        ),
        (
            {"llama.attention.head_count": 8},
            r"'blk.0.attn_k.weight' has shape \[128, 256\]",
        ),
        (
            {"llama.embedding_length": 512},
            r"'token_embd.weight' has shape \[48, 256\], but",
        ),
        (
            {"llama.feed_forward_length": 64},
            "'blk.1.ffn_up.weight' .*feed_forward_length=64",
        ),
        (
            {"llama.attention.key_length": 7},
            "key_length=7; rotary positions need an even",
        ),
        ({"llama.attention.key_length": 2**30}, "'blk.1.attn_q.weight' has shape"),
        (
            {"llama.attention.value_length": 32},
            "value_length=32 is not implement",
        ),
        (
            {"llama.rope.dimension_count": 32},
            "rope.dimension_count=32 is not imp",
        ),
        ({"llama.vocab_size": 99}, "llama.vocab_size=99 is not implemented"),
        (
            {"llama.attention.layer_norm_rms_epsilon": 0.0},
            "rms_epsilon=0.0; it must be",
        ),
        (
            {"llama.rope.freq_base": float("nan")},
            "rope.freq_base=nan; it must be a num",
        ),
        (
            {"llama.rope.scaling.type": "longrope"},
            "scaling.type='longrope'; it must be",
        ),
        ({"llama.rope.scaling.type": "linear"}, "rope type 'linear' lacks factor"),
        ({"llama.rope.scaling.attn_factor": 2.0}, "not implemented: .*attn_factor=2.0"),
        (
            {"llama.attention.causal": False},
            "not implemented: llama.attention.causal=Fal",
        ),
        ({"llama.expert_count": 8}, "llama.expert_count=8; load the model .* hf.load"),
        ({"llama.attention.sliding_window": 64}, "llama.attention.sliding_window=64"),
    ],
)
def test_what_is_not_implemented_is_said(tmp_path, held, fields, message):
    made.write(tmp_path / "x.gguf", held, metadata=fields)
    with pytest.raises(ValueError, match=f"x.gguf: .*{message}"):
        gguf.load(tmp_path / "x.gguf")


def test_switches_that_are_off_are_harmless(tmp_path, held):
    off = {"llama.expert_count": 0, "llama.rope.scaling.attn_factor": 1.0}
    off |= {"llama.rope.scaling.finetuned": True, "llama.attention.sliding_window": 0}
    want = config_of(tmp_path, held)
    assert config_of(tmp_path, held, metadata=off) == want


def test_architectures_and_tensors_that_are_not_known(tmp_path, held):
    made.write(tmp_path / "x.gguf", held, "gemma3")
    with pytest.raises(
        ValueError, match="architecture='gemma3' is not impl.*llama, qwe"
    ):
        gguf.load(tmp_path / "x.gguf")
    gone = {name: own for name, own in held.items() if name != "token_embd.weight"}
    made.write(tmp_path / "x.gguf", gone)
    with pytest.raises(ValueError, match="there is no tensor 'token_embd.weight'"):
        gguf.load(tmp_path / "x.gguf")
    gone = {name: own for name, own in held.items() if name != "output_norm.weight"}
    made.write(tmp_path / "x.gguf", gone)
    with pytest.raises(
        ValueError, match="missing: output_norm.weight; left over: none"
    ):
        gguf.load(tmp_path / "x.gguf")
    odd = held | {"blk.0.ffn_up.weight": (Type.I8, np.ones((256, 256), np.int8))}
    made.write(tmp_path / "x.gguf", odd)
    with pytest.raises(ValueError, match="'blk.0.ffn_up.weight' has the ggml type I8"):
        gguf.load(tmp_path / "x.gguf")


@pytest.mark.parametrize("quantize", ["file", None])
def test_values_that_are_not_finite(tmp_path, held, quantize):
    kind, raw = held["blk.1.ffn_up.weight"]
    raw = raw.copy()
    raw[3, :2] = np.float16(np.nan).reshape(1).view(np.uint8)
    made.write(tmp_path / "x.gguf", held | {"blk.1.ffn_up.weight": (kind, raw)})
    with pytest.raises(
        ValueError, match="x.gguf: 'blk.1.ffn_up.weight' holds NaN or in"
    ):
        gguf.load(tmp_path / "x.gguf", quantize=quantize)
