"""Models in GGUF files: every type, dense and with its codes kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax import sharding
from lorax.interop import gguf
from lorax.interop.gguf.blocks import FORMS, Type
from lorax.quantized import Quantized
from tests.interop import gguf_files as made

pytestmark = pytest.mark.once

FAMILY = {
    "attn_q": ("q", (4, 64)),
    "attn_k": ("k", (2, 64)),
    "attn_v": ("v", (2, 64)),
    "attn_output": ("o", (256,)),
    "ffn_gate": ("gate", (256,)),
    "ffn_up": ("up", (256,)),
    "ffn_down": ("down", (256,)),
}


def expected(path, architecture="llama"):
    """The leaves of a scanned model, from the format's own decoder."""
    held = made.weights(path)
    leaves = {
        "embed/embedding": held["token_embd.weight"],
        "norm_out/scale": held["output_norm.weight"],
    }
    if "output.weight" in held:
        leaves["head/kernel"] = held["output.weight"].T
    for name, (own, outputs) in FAMILY.items():
        stack = []
        for i in range(2):
            rows = held[f"blk.{i}.{name}.weight"]
            if own in "qk" and architecture == "llama":
                rows = made.by_halves(rows, outputs[0])
            shape = (4, 64, *outputs) if own == "o" else (256, *outputs)
            stack.append(rows.T.reshape(shape))
        leaves[f"layers/{own}/kernel"] = np.stack(stack)
    for name, own in {"attn": "norm_attn", "ffn": "norm_mlp"}.items():
        norms = [held[f"blk.{i}.{name}_norm.weight"] for i in range(2)]
        leaves[f"layers/{own}/scale"] = np.stack(norms)
    return leaves


def small(tmp_path, kind=Type.Q4_1, **more):
    """A file whose matrices are all of one type."""
    return made.write(tmp_path / "x.gguf", made.tensors(lambda name: kind), **more)


@pytest.mark.parametrize("kind", [*FORMS, Type.F32, Type.F16, Type.BF16, Type.Q2_K])
def test_dense_leaves_are_those_of_the_formats_own_decoder(tmp_path, kind):
    path = small(tmp_path, kind)
    model, params = gguf.load(path)
    for name, want in expected(path).items():
        leaf = lorax.tree.flatten(params)[name]
        np.testing.assert_array_equal(np.asarray(leaf, np.float32), want, name)
    plain = {Type.F16: jnp.float16, Type.BF16: jnp.bfloat16}
    assert params["layers"]["up"]["kernel"].dtype == plain.get(kind, jnp.float32)
    assert model.config.dtype == plain.get(kind, jnp.float32)


BITS = {"Q4_0": 4.5, "Q4_1": 5.25, "Q5_0": 8.5, "Q5_1": 9, "Q8_0": 8.5}
BITS |= {"Q4_K": 6.25, "Q5_K": 10, "Q6_K": 10}


@pytest.mark.parametrize("kind", list(FORMS))
def test_coded_leaves_stand_for_the_same_weights(tmp_path, kind):
    path = small(tmp_path, kind)
    _, params = gguf.load(path, quantize="file")
    leaves = lorax.tree.flatten(params)
    for name, want in expected(path).items():
        leaf = leaves[name]
        assert isinstance(leaf, Quantized) == name.startswith("layers/") * (
            "kernel" in name
        )
        np.testing.assert_array_equal(np.asarray(jnp.asarray(leaf)), want, name)
        if isinstance(leaf, Quantized):
            assert leaf.nbytes * 8 / leaf.size == BITS[kind.name]


def forward_of(model):
    return lambda params, tokens: model.apply({"params": params}, tokens)


TOKENS = np.arange(24).reshape(2, 12) % made.VOCABULARY


def mixed(name):
    """Types as in a Q4_K_M file: every other layer has more bits."""
    if "ffn_down" in name or "attn_v" in name:
        return Type.Q6_K if "blk.1" in name else Type.Q4_K
    if "blk" not in name:  # the embedding and the head
        return Type.Q6_K
    return {"attn_k": Type.Q8_0, "attn_q": Type.Q4_0}.get(name.split(".")[2], Type.Q4_K)


def test_a_stack_of_two_types_has_codes_of_eight_bits(tmp_path):
    path = made.write(tmp_path / "x.gguf", made.tensors(mixed))
    _, params = gguf.load(path, quantize="file")
    leaves = lorax.tree.flatten(params)
    for name, want in expected(path).items():
        np.testing.assert_array_equal(jnp.asarray(leaves[name]), want, name)
    down, gate = leaves["layers/down/kernel"], leaves["layers/gate/kernel"]
    assert (down.block, down.codes.dtype, down.scales.shape) == (
        0,
        "int8",
        (2, 16, 256),
    )
    assert (gate.block, gate.codes.dtype, gate.scales.shape) == (
        32,
        "uint8",
        (2, 8, 256),
    )
    _, apart = gguf.load(path, quantize="file", scan=False)
    apart = lorax.tree.flatten(apart)
    assert [apart[f"layers_{i}/down/kernel"].block for i in (0, 1)] == [32, 0]
    for i in (0, 1):
        for own in ("down", "q"):
            leaf = jnp.asarray(apart[f"layers_{i}/{own}/kernel"])
            want = expected(path)[f"layers/{own}/kernel"][i]
            np.testing.assert_array_equal(leaf, want)


def test_types_without_codes_are_decoded_and_named(tmp_path):
    kinds = lambda name: Type.Q2_K if "1.ffn_up" in name else Type.Q4_0
    path = made.write(tmp_path / "x.gguf", made.tensors(kinds))
    with pytest.warns(UserWarning, match="are decoded:\n  layers/up/kernel: Q2_K\n"):
        _, params = gguf.load(path, quantize="file")
    up = params["layers"]["up"]["kernel"]
    np.testing.assert_array_equal(up, expected(path)["layers/up/kernel"])
    assert isinstance(params["layers"]["down"]["kernel"], Quantized)


@pytest.mark.parametrize("width", [96, 160])
def test_blocks_that_reach_across_heads(tmp_path, width):
    """Heads of 48 and 80 inputs of o: one scale per 16, which divides both."""
    sizes = {"embedding_length": width, "attention.head_count": 2}
    sizes |= {"attention.head_count_kv": 1}
    held = made.tensors(lambda name: Type.Q4_1, **sizes)
    path = made.write(tmp_path / "x.gguf", held, **sizes)
    _, params = gguf.load(path, quantize="file")
    o = params["layers"]["o"]["kernel"]
    assert o.block == 16 and o.scales.shape == (2, 2, width // 32, width)
    for i in range(2):
        want = made.weights(path)[f"blk.{i}.attn_output.weight"].T
        np.testing.assert_array_equal(jnp.asarray(o)[i].reshape(want.shape), want)


@pytest.mark.parametrize("scan", [True, False])
def test_a_coded_model_computes_what_the_dense_one_does(tmp_path, scan):
    held = made.tensors(mixed, tied=False)
    path = made.write(tmp_path / "x.gguf", held, tied=False)
    model, dense = gguf.load(path, scan=scan)
    _, coded = gguf.load(path, scan=scan, quantize="file")
    assert isinstance(coded["head"]["kernel"], Quantized)
    forward = forward_of(model)
    want = jax.jit(forward)(dense, TOKENS)
    found = jax.jit(lorax.adapt(forward))({}, coded, TOKENS)
    np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())
    if not scan:
        return
    kernels = lorax.discover(forward, dense, TOKENS)
    target = lorax.Target(".*/(q|down)/kernel", rank=2)
    adapters, _ = lorax.init(jax.random.key(0), coded, [target], kernels)
    adapters = jax.tree.map(lambda x: x + 0.05, adapters)
    loss = lambda adapters, params: lorax.adapt(forward)(adapters, params, TOKENS).sum()
    grads = jax.jit(jax.grad(loss))
    for one, other in zip(
        jax.tree.leaves(grads(adapters, coded)), jax.tree.leaves(grads(adapters, dense))
    ):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())
    plain = lorax.tree.flatten(lorax.merge(adapters, coded))
    for name, leaf in lorax.tree.flatten(lorax.merge(adapters, dense)).items():
        if name in adapters:
            np.testing.assert_allclose(plain[name], leaf, atol=1e-6)


def test_the_dtype_asked_for(tmp_path):
    path = small(tmp_path, Type.Q4_K)
    wide = expected(path)["layers/up/kernel"]
    for quantize in ("file", None):
        model, params = gguf.load(path, dtype=jnp.bfloat16, quantize=quantize)
        assert model.config.dtype == jnp.bfloat16
        up = params["layers"]["up"]["kernel"]
        assert up.dtype == params["embed"]["embedding"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(jnp.asarray(up), wide.astype(jnp.bfloat16))
        assert params["norm_out"]["scale"].dtype == jnp.float32


@pytest.mark.parametrize("quantize", ["file", None])
def test_leaves_are_read_into_their_shards(tmp_path, quantize):
    path = small(tmp_path, Type.Q4_1)
    mesh = jax.make_mesh((2, 2), ("x", "y"), devices=jax.devices()[:4])
    spec = jax.sharding.PartitionSpec
    rules = [("layers/(q|up)/kernel", spec(None, "x", "y")), (".*", spec())]

    def shardings(model, shapes):
        return sharding.place(shapes, mesh, rules=rules).tree(shapes)

    _, params = gguf.load(path, quantize=quantize, shardings=shardings)
    leaves = lorax.tree.flatten(params)
    for name, want in expected(path).items():
        np.testing.assert_array_equal(jnp.asarray(leaves[name]), want, name)
    for array in jax.tree.leaves(leaves["layers/up/kernel"]):
        assert array.sharding.shard_shape(array.shape)[1:] == (
            array.shape[1] // 2,
            array.shape[2] // 2,
        )


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_transformers_model_of_the_same_file(tmp_path, architecture):
    """Its GGUF reader has its own table of names, keys and reordered rows."""
    torch, transformers = (
        pytest.importorskip(name) for name in ("torch", "transformers")
    )
    sizes = {"tied": False}
    sizes |= {"biased": True} if architecture == "qwen2" else {}
    if architecture == "qwen3":
        sizes |= {"normed": True, "attention.key_length": 128}
        sizes |= {"attention.value_length": 128}
    kinds = lambda name: Type.Q8_0 if "attn" in name else Type.Q4_0
    held = made.tensors(kinds, **sizes)
    words = [f"<{i}>" for i in range(made.VOCABULARY)]
    told = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.merges": ["< 0"],
        f"{architecture}.rope.freq_base": 5e3,
    }
    path = made.write(tmp_path / "x.gguf", held, architecture, told, **sizes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="x.gguf"
    )
    with torch.no_grad():
        want = theirs(torch.tensor(TOKENS)).logits.numpy()
    model, params = gguf.load(path)
    found = jax.jit(forward_of(model))(params, TOKENS)
    np.testing.assert_allclose(found, want, atol=2e-5 * np.abs(want).max())


def test_rules_make_codes_of_the_weights(tmp_path):
    path = small(tmp_path, Type.Q8_0)
    model, dense = gguf.load(path)
    rules = [("layers/(q|o)/kernel", "int8"), ("all-linear", "nf4")]
    _, found = gguf.load(path, quantize=rules)
    kernels = lorax.discover(forward_of(model), dense, TOKENS)
    want = lorax.quantize(dense, rules, kernels)
    jax.tree.map(np.testing.assert_array_equal, found, want)
    assert found["layers"]["up"]["kernel"].codebook == "nf4"
    with pytest.raises(ValueError, match="the format 'nf5' is not one of"):
        gguf.load(path, quantize="nf5")
