"""GGUF LoRA files: what llama.cpp computes from them, in float64, and back."""

import dataclasses
import functools
import struct

import gguf as library
import jax
import numpy as np
import pytest

import lorax
from lorax import compose
from lorax.interop import gguf
from lorax.models import gpt2, llama
from tests.interop import gguf_files as made

pytestmark = pytest.mark.once

SMALL = llama.Config(31, 64, 32, 2, 4, 2, 8, 48, tied=False)
MODULES = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
MODULES |= {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}


@functools.cache
def base_of(config):
    """Random parameters, and their kernels."""
    model, tokens = llama.Model(config), np.arange(6)[None]
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    return params, lorax.discover(lambda p: model.apply({"params": p}, tokens), params)


def adapted(config, *targets, **fields):
    """Adapters with random factors, and their base."""
    params, kernels = base_of(config)
    targets = targets or (lorax.Target(".*kernel", **{"rank": 3, "alpha": 6} | fields),)
    adapters, base = lorax.init(jax.random.key(1), params, targets, kernels)
    draw = np.random.default_rng(0)
    fill = lambda x: (draw.standard_normal(x.shape) / 4).astype(np.float32)
    return jax.tree.map(fill, adapters), base


def meant(path):
    """`{tensor: change of W}` by llama.cpp's rule, using the format's own reader."""
    reader = library.GGUFReader(path)
    (alpha,) = reader.fields["adapter.lora.alpha"].parts[-1]
    held = {t.name: np.float64(t.data) for t in reader.tensors}
    found = {}
    for name in {key.rpartition(".")[0] for key in held}:
        a, b = held[f"{name}.lora_a"], held[f"{name}.lora_b"]
        scale = float(alpha) / b.shape[1] if alpha else 1.0
        found[name] = scale * (a @ b.T if name.startswith("token_embd") else b @ a)
    return found


def changes(config, adapters, base):
    """The same from `lorax.merge`, with the names and row order of a GGUF file."""
    zeros = jax.tree.map(np.zeros_like, base)
    delta = lorax.tree.flatten(lorax.merge(adapters, zeros))
    found = {}
    for i in range(config.layers):
        for own, name in MODULES.items():
            stack = delta.get(f"layers/{own}/kernel")
            leaf = stack[i] if stack is not None else delta[f"layers_{i}/{own}/kernel"]
            inputs = leaf.size // leaf.shape[-1] if own == "o" else config.width
            if own in ("gate", "up", "down"):
                inputs = leaf.shape[0]
            rows = np.float64(leaf).reshape(inputs, -1).T
            if own in "qk" and config.model_type in ("llama", "mistral"):
                heads = {"q": config.heads, "k": config.kv_heads}[own]
                order = made.by_halves(np.arange(len(rows)), heads)
                rows = rows[np.argsort(order)]
            found[f"blk.{i}.{name}.weight"] = rows
    if "head/kernel" in delta:
        found["output.weight"] = np.float64(delta["head/kernel"]).T
    found["token_embd.weight"] = np.float64(delta["embed/embedding"])
    return {name: rows for name, rows in found.items() if rows.any()}


def check(path, config, adapters, base):
    want, found = changes(config, adapters, base), meant(path)
    assert set(found) == set(want)
    for name, rows in want.items():
        np.testing.assert_allclose(
            found[name], rows, atol=1e-6 * np.abs(rows).max(), err_msg=name
        )


KINDS = [
    SMALL,
    dataclasses.replace(SMALL, scan=False),
    dataclasses.replace(SMALL, model_type="mistral"),
    dataclasses.replace(SMALL, model_type="qwen2", qkv_bias=True),
    dataclasses.replace(SMALL, model_type="qwen3", qk_norm=True, tied=True),
]


@pytest.mark.parametrize("config", KINDS, ids=lambda c: f"{c.model_type}-{c.scan}")
def test_the_files_mean_what_merge_does(tmp_path, config):
    adapters, base = adapted(config)
    path = tmp_path / "lora.gguf"
    gguf.save_adapters(path, adapters, config)
    check(path, config, adapters, base)
    reader = library.GGUFReader(path)
    told = {key: field.contents() for key, field in reader.fields.items()}
    kind = {"mistral": "llama"}.get(config.model_type, config.model_type)
    assert told["general.architecture"] == kind
    assert (told["general.type"], told["adapter.type"]) == ("adapter", "lora")
    assert told["adapter.lora.alpha"] == 6
    shapes = {t.name: tuple(t.shape) for t in reader.tensors}  # as ggml has them
    assert shapes["blk.1.ffn_down.weight.lora_a"] == (48, 3)
    assert shapes["blk.1.ffn_down.weight.lora_b"] == (3, 32)
    again = gguf.load_adapters(path, config)
    assert again.keys() == adapters.keys()
    for name, adapter in adapters.items():
        assert again[name].scale == adapter.scale and again[name].axes == adapter.axes
        np.testing.assert_array_equal(again[name].a, adapter.a)
        np.testing.assert_array_equal(again[name].b, adapter.b)


def test_ranks_and_scales_that_differ(tmp_path):
    targets = [
        lorax.Target("layers/q/kernel", rank=2, alpha=6),
        lorax.Target("layers/(v|up)/kernel", rank=3, alpha=4),
        lorax.Target("layers/(k|down)/kernel", rank=2),
        lorax.Target("embed/embedding", rank=2, alpha=3),
        lorax.Target("layers/gate/kernel", rank=2, adapter="loha"),
        lorax.Target("layers/o/kernel", rank=2, adapter="adalora"),
    ]
    adapters, base = adapted(SMALL, *targets)
    for own, scale in {"k": -1.3, "down": 0.0}.items():
        name = f"layers/{own}/kernel"
        adapters[name] = adapters[name].replace(scale=scale)
    path = tmp_path / "lora.gguf"
    gguf.save_adapters(path, adapters, SMALL)
    held = {t.name: t.data for t in library.GGUFReader(path).tensors}
    assert not held.pop("blk.0.ffn_down.weight.lora_b").any()
    found = meant(path)
    want = changes(SMALL, adapters, base)
    assert set(found) == {*want, "blk.0.ffn_down.weight", "blk.1.ffn_down.weight"}
    for name, rows in want.items():
        np.testing.assert_allclose(found[name], rows, atol=1e-6 * np.abs(rows).max())
    again = gguf.load_adapters(path, SMALL, dropout=0.25)
    assert again["layers/v/kernel"].dropout == 0.25
    merged = lorax.tree.flatten(lorax.merge(again, base))
    for name, leaf in lorax.tree.flatten(lorax.merge(adapters, base)).items():
        np.testing.assert_allclose(merged[name], leaf, atol=1e-5)


def test_scales_that_are_all_zero(tmp_path):
    """llama.cpp reads an alpha of 0 as a scale of 1."""
    adapters = compose.scale(adapted(SMALL)[0], 0.0)
    gguf.save_adapters(tmp_path / "x.gguf", adapters, SMALL)
    assert not any(rows.any() for rows in meant(tmp_path / "x.gguf").values())


def test_a_part_of_the_layers(tmp_path):
    adapters, base = adapted(SMALL, lorax.Target("layers/q/kernel", rank=2, layers=[1]))
    gguf.save_adapters(tmp_path / "x.gguf", adapters, SMALL)
    check(tmp_path / "x.gguf", SMALL, adapters, base)
    again = gguf.load_adapters(tmp_path / "x.gguf", SMALL)
    assert again["layers/q/kernel"].layers == (1,)


def test_what_pissa_learnt_is_written_for_the_original_base(tmp_path):
    target = lorax.Target("layers/(q|up)/kernel", rank=2, init="pissa")
    params, kernels = base_of(SMALL)
    start, moved = lorax.init(jax.random.key(1), params, [target], kernels)
    trained = jax.tree.map(lambda x: 1.5 * x, start)
    path = tmp_path / "x.gguf"
    with pytest.raises(ValueError, match="layers/q/kernel: .*initial is what lorax"):
        gguf.save_adapters(path, trained, SMALL)
    gguf.save_adapters(path, trained, SMALL, initial=start)
    again = lorax.merge(gguf.load_adapters(path, SMALL), params)
    want = lorax.merge(trained, moved)
    for name, leaf in lorax.tree.flatten(want).items():
        np.testing.assert_allclose(lorax.tree.flatten(again)[name], leaf, atol=1e-5)


def test_what_a_file_of_pairs_cannot_hold(tmp_path):
    path, tied = tmp_path / "x.gguf", dataclasses.replace(SMALL, tied=True)
    dora, _ = adapted(SMALL, adapter="dora")
    with pytest.raises(ValueError, match="are Dora.*compose.extract"):
        gguf.save_adapters(path, dora, SMALL)
    oft, _ = adapted(SMALL, lorax.Target("layers/up/kernel", rank=2, adapter="oft"))
    with pytest.raises(ValueError, match="layers/up/kernel.* are Oft"):
        gguf.save_adapters(path, oft, SMALL)
    full, _ = adapted(SMALL, lorax.Target("norm_out/scale", adapter="full"))
    with pytest.raises(
        ValueError, match="norm_out/scale: .*Full, with full values; merge"
    ):
        gguf.save_adapters(path, full, SMALL)
    embed, _ = adapted(tied, lorax.Target("embed/embedding", rank=2))
    with pytest.raises(ValueError, match="embed/embedding is embedding and head in on"):
        gguf.save_adapters(path, embed, tied)
    lora, _ = adapted(SMALL)
    with pytest.raises(KeyError, match="head/kernel"):
        gguf.save_adapters(path, lora, tied)
    with pytest.raises(
        ValueError, match="gpt2.Config is not the config of a supported archit"
    ):
        gguf.save_adapters(path, {}, gpt2.Config(31, 16, 8, 2, 2, 32))
    bad = jax.tree.map(lambda x: x * np.nan, lora)
    with pytest.raises(ValueError, match="'output.weight.lora_a' would hold NaN"):
        gguf.save_adapters(path, bad, SMALL)
    assert not path.exists()


def lora_file(path, tensors, **fields):
    """A file written by the format's own package."""
    told = {"general.type": "adapter", "adapter.type": "lora"}
    told |= {"adapter.lora.alpha": 4.0} | fields
    file = library.GGUFWriter(path, told.pop("general.architecture", "llama"))
    for key, value in told.items():
        kind = library.GGUFValueType.get_type(value)
        file.add_key_value(key, value, kind)
    for name, array in tensors.items():
        file.add_tensor(name, array)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


UP = "blk.0.ffn_up.weight.lora_"
GOOD = {UP + "a": np.ones((2, 32), np.float16), UP + "b": np.ones((48, 2), np.float16)}


def test_half_precision_is_read(tmp_path):
    path = lora_file(
        tmp_path / "x.gguf",
        GOOD
        | {key.replace("blk.0", "blk.1"): 2 * array for key, array in GOOD.items()},
    )
    up = gguf.load_adapters(path, SMALL)["layers/up/kernel"]
    assert up.a.dtype == up.b.dtype == np.float32 and up.scale == 2
    np.testing.assert_array_equal(up.delta(np.zeros((2, 32, 48)))[1], 2 * 2 * 2 * 2)


@pytest.mark.parametrize(
    ("tensors", "fields", "message"),
    [
        (
            GOOD,
            {"general.type": "model"},
            "general.type='model'; for an adapter.*'adapter'",
        ),
        (
            GOOD,
            {"adapter.type": "x"},
            "adapter.type='x'; for an adapter of this model",
        ),
        (
            GOOD,
            {"general.architecture": "qwen2"},
            "general.architecture='qwen2'; for an ad",
        ),
        (GOOD, {"adapter.lora.alpha": float("nan")}, "adapter.lora.alpha=nan; it must"),
        (GOOD, {"adapter.alora.invocation_tokens": [1]}, "invocation_tokens: the adap"),
        ({UP + "a": GOOD[UP + "a"]}, {}, "blk.0.ffn_up.weight: it has no '.lora_b'"),
        (
            GOOD | {UP + "b": np.ones((48, 3), np.float32)},
            {},
            "shapes .2, 32. and .48, 3",
        ),
        (
            GOOD | {"blk.0.attn_norm.weight": np.ones(32, np.float32)},
            {},
            "'blk.0.attn_n",
        ),
        (
            GOOD | {"blk.7.ffn_up.weight.lora_a": GOOD[UP + "a"]},
            {},
            "'blk.7.ffn_up.weig",
        ),
        (
            GOOD | {UP + "b": np.full((48, 2), np.inf, np.float32)},
            {},
            f"'{UP}b' holds NaN",
        ),
    ],
)
def test_files_that_are_not_for_this_model(tmp_path, tensors, fields, message):
    path = lora_file(tmp_path / "x.gguf", tensors, **fields)
    with pytest.raises(ValueError, match=f"x.gguf: .*{message}"):
        gguf.load_adapters(path, SMALL)


def test_a_model_is_not_an_adapter_nor_the_other_way_round(tmp_path):
    path = lora_file(tmp_path / "x.gguf", GOOD)
    with pytest.raises(ValueError, match="general.type='adapter'.*gguf.load_adapters"):
        gguf.load(path)
    content = path.read_bytes()
    path.write_bytes(content[:-200])
    with pytest.raises(ValueError, match="x.gguf: 'blk.0.ffn_up.*is truncated"):
        gguf.load_adapters(path, SMALL)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**50, 1) + bytes(99))
    with pytest.raises(ValueError, match="1125899906842624 tensors.*beyond"):
        gguf.load_adapters(path, SMALL)


def test_the_adapter_of_a_tied_embedding_is_refused(tmp_path):
    tied = dataclasses.replace(SMALL, tied=True)
    pair = {"a": np.ones((31, 2), np.float32), "b": np.ones((32, 2), np.float32)}
    held = {f"token_embd.weight.lora_{end}": array for end, array in pair.items()}
    path = lora_file(tmp_path / "x.gguf", held)
    found = gguf.load_adapters(path, SMALL)["embed/embedding"]
    assert found.a.shape == (31, 2) and found.b.shape == (2, 32)
    with pytest.raises(ValueError, match="token_embd.weight: the adapter is on an emb"):
        gguf.load_adapters(path, tied)


@pytest.mark.slow
def test_llama_cpp_computes_the_same(tmp_path):
    """The base, and the base with the adapter; needs `pip install llama-cpp-python`."""
    llama_cpp = pytest.importorskip("llama_cpp")
    sizes = {"embedding_length": 64, "feed_forward_length": 96, "tied": False}
    words = [f"<{i}>" for i in range(made.VOCABULARY)]
    told = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}
    told |= {"tokenizer.ggml.tokens": words, "tokenizer.ggml.merges": ["< 0"]}
    held = made.tensors(lambda name: library.GGMLQuantizationType.F32, **sizes)
    base = made.write(tmp_path / "base.gguf", held, metadata=told, **sizes)
    model, params = gguf.load(base)
    adapters, _ = adapted(model.config)
    gguf.save_adapters(tmp_path / "lora.gguf", adapters, model.config)
    tokens = np.arange(12)
    forward = lambda p: model.apply({"params": p}, tokens[None])[0]
    found = {}
    for what, lora in {"base": None, "adapted": str(tmp_path / "lora.gguf")}.items():
        theirs = llama_cpp.Llama(
            str(base),
            lora_path=lora,
            n_ctx=32,
            logits_all=True,
            type_k=0,  # float32 keys and values
            type_v=0,
            verbose=False,
        )
        theirs.eval(tokens.tolist())
        found[what] = np.array(theirs.scores[: len(tokens)])
    want = {"base": params, "adapted": lorax.merge(adapters, params)}
    for what, given in want.items():
        logits = forward(given)
        size = np.abs(logits).max()
        print(what, np.abs(found[what] - logits).max() / size)
        np.testing.assert_allclose(found[what], logits, atol=1e-5 * size)
    effect = np.abs(found["adapted"] - found["base"]).max()
    assert effect > 0.1 * np.abs(found["base"]).max()
