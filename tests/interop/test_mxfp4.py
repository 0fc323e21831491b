"""GPT-OSS in MXFP4: codes are kept, and decode to what transformers decodes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorax
from lorax import models, sharding
from lorax.interop import hf
from lorax.models import table
from lorax.quantized import is_quantized
from tests.models import golden

transformers = pytest.importorskip("transformers", reason="needs the golden extra")
torch = pytest.importorskip("torch", reason="needs the golden extra")

SIZES = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 6,
    "pad_token_id": 0,
}
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
VALUES = np.array([*E2M1, *(-value for value in E2M1)])
FILE = "model.safetensors"


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    """A checkpoint with random codes, and the dense kernels by their keys."""
    folder = tmp_path_factory.mktemp("coded")
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES))
    golden.redraw(model).save_pretrained(folder)
    tensors, dense = load_file(folder / FILE), {}
    rng = np.random.default_rng(0)
    for key in [k for k in tensors if k.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(key).shape
        blocks = rng.integers(256, size=(experts, outputs, inputs // 32, 16))
        scales = rng.integers(121, 125, size=blocks.shape[:-1])
        low_first = np.stack([blocks & 15, blocks >> 4], -1)
        values = VALUES[low_first] * 2.0 ** (scales - 127)[..., None, None]
        dense[key] = values.reshape(experts, outputs, inputs).swapaxes(1, 2)
        tensors[f"{key}_blocks"] = blocks.astype(np.uint8)
        tensors[f"{key}_scales"] = scales.astype(np.uint8)
    save_file(tensors, folder / FILE, {"format": "pt"})
    told = json.loads((folder / "config.json").read_text())
    told["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(told))
    return folder, dense


def rewritten(coded, folder, change):
    """The checkpoint with changed tensors."""
    for file in coded[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, {"format": "pt"})
    return folder


@pytest.mark.parametrize("scan", [True, False])
def test_codes_are_kept_and_stand_for_the_dense_kernels(coded, scan):
    folder, dense = coded
    model, params = hf.load(folder, scan=scan)
    flat = lorax.tree.flatten(params)
    packed = {path for path, leaf in flat.items() if is_quantized(leaf)}
    assert packed == {p for p in flat if "experts" in p and p.endswith("kernel")}
    places = table.locate(
        models.mixture.entries(model.config), model.config.stacks, scan
    )
    for key, want in dense.items():
        place = places[key]
        leaf = flat[place.path]
        assert leaf.codes.dtype == jnp.uint8 and 2 * leaf.codes.size == leaf.size
        found = np.asarray(jnp.asarray(leaf), np.float64)[place.part]
        np.testing.assert_array_equal(
            found, table.from_disk(want, found.shape, place.entry)
        )


def test_logits_are_those_of_transformers(coded):
    folder, _ = coded
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation="eager",
        experts_implementation="eager",
        quantization_config=transformers.Mxfp4Config(dequantize=True),
        dtype=torch.float32,
    )
    tokens = golden.tokens_of(61, time=20)
    expected = golden.reference(theirs.eval(), tokens)
    model, params = hf.load(folder)
    read = lambda params: model.apply({"params": params}, tokens)
    run = jax.jit(lorax.adapt(read, on_merge="error"))
    golden.assert_close(run({}, params), expected)
    kernels = lorax.discover(read, params)
    target = lorax.Target(models.EXPERTS, rank=2)
    adapters, params = lorax.init(jax.random.key(0), params, [target], kernels)
    golden.assert_close(run(adapters, params), expected)  # b = 0
    b = lambda x: 0.1 * jax.random.normal(jax.random.key(1), x.shape)
    adapters = {path: a.replace(b=b(a.b)) for path, a in adapters.items()}
    wide = lambda leaf: jnp.asarray(leaf).astype(jnp.float32)
    dense = jax.tree.map(wide, params, is_leaf=is_quantized)
    want = jax.jit(read)(lorax.merge(adapters, dense))
    golden.assert_close(run(adapters, params), np.asarray(want, np.float64))


def test_shards_have_their_own_codes(coded):
    mesh = sharding.make_mesh(expert=2, fsdp=2, tensor=2)
    axes = lambda model: table.logical_axes(
        models.mixture.entries(model.config), model.config.stacks, model.config.scan
    )
    placed = lambda model, shapes: sharding.place(
        shapes, mesh, axes(model), may_replicate=("vocab", "kv_heads")
    ).tree(shapes)
    _, params = hf.load(coded[0], shardings=placed)
    _, whole = hf.load(coded[0])
    for path, leaf in lorax.tree.flatten(params).items():
        if is_quantized(leaf):
            assert leaf.codes.addressable_shards[0].data.size < leaf.codes.size
            same = jax.tree.map(np.array_equal, leaf, lorax.tree.flatten(whole)[path])
            assert all(jax.tree.leaves(same))


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda t: t.pop(SCALES), "its scales '.*down_proj_scales' are missing"),
        (
            lambda t: t.update({SCALES: t[SCALES][:2]}),
            r"blocks' has shape \[4, 64, 1, 16",
        ),
        (lambda t: t.update({BLOCKS: t[BLOCKS][..., :8]}), r"\[4, 64, 1, 8\].*uint8"),
    ],
)
def test_damage_is_named(coded, tmp_path, change, match):
    with pytest.raises(ValueError, match=match):
        hf.load(rewritten(coded, tmp_path, change))


SCALES = "model.layers.0.mlp.experts.down_proj_scales"
BLOCKS = "model.layers.0.mlp.experts.down_proj_blocks"


def test_what_is_in_codes_is_not_quantised_again(coded):
    with pytest.raises(ValueError, match="is already quantised"):
        hf.load(coded[0], quantize=[(models.EXPERTS, "nf4")])
