"""Checkpoints on disk: layouts, round trips, shards, and damaged files."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lorax.interop import files, hf
from lorax.models import gpt2, llama
from tests.data_paths import DATA, needs_data

SMALL = llama.Config(61, 64, 32, 2, 4, 2, 8, 48, tied=False, qkv_bias=True, o_bias=True)


def tensors_of(config, seed=0, dtype=np.float32):
    """A random checkpoint for this config: `{key: tensor}`."""
    family = hf.family_of(config.to_hf(), "")
    shapes = hf.abstract(family.Model(config))
    draw = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda s: (draw.standard_normal(s.shape) / 4).astype(dtype), shapes
    )
    return hf.to_disk(config, params)


def write(directory, config, tensors, **fields):
    """A checkpoint directory, written by hand."""
    directory.mkdir(exist_ok=True)
    told = {**config.to_hf(), **fields}
    told = {name: value for name, value in told.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(told))
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.fixture
def made(tmp_path):
    return write(tmp_path / "made", SMALL, tensors_of(SMALL))


def logits(source, **kwargs):
    model, params = hf.load(source, **kwargs)
    tokens = np.arange(40).reshape(2, 20) % 61
    return np.asarray(jax.jit(model.apply)({"params": params}, tokens))


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
def test_round_trip_is_bit_exact(tmp_path, scan, dtype):
    written = tensors_of(SMALL, dtype=dtype)
    source = write(tmp_path / "one", SMALL, written)
    model, params = hf.load(source, scan=scan)
    assert model.config.dtype == dtype
    hf.save(tmp_path / "two", model.config, params, file_bytes=9_000)
    assert len(list((tmp_path / "two").glob("*.safetensors"))) > 3
    again = files.open_checkpoint(tmp_path / "two")
    assert set(again) == set(written)
    for key, tensor in written.items():
        assert again[key].dtype == tensor.dtype
        assert again[key].read().tobytes() == tensor.tobytes(), key
    loaded, second = hf.load(tmp_path / "two", scan=scan)
    assert loaded.config == model.config
    jax.tree.map(np.testing.assert_array_equal, params, second)
    hf.save(tmp_path / "two", model.config, params)
    assert len(list((tmp_path / "two").glob("model*"))) == 1


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}


def test_both_layouts_of_the_rotary_fields(tmp_path):
    tensors = tensors_of(SMALL)
    v5 = {"rope_parameters": {**LLAMA3, "rope_type": "llama3", "rope_theta": 500.0}}
    named = {"rope_scaling": {**LLAMA3, "rope_type": "llama3"}, "rope_theta": 500.0}
    typed = {"rope_scaling": {**LLAMA3, "type": "llama3"}, "rope_theta": 500.0}
    found = []
    for i, fields in enumerate((v5, named, typed)):
        empty = dict.fromkeys(("rope_parameters", "rope_scaling", "rope_theta"))
        source = write(tmp_path / f"{i}", SMALL, tensors, **{**empty, **fields})
        found.append(logits(source))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
    plain = logits(write(tmp_path / "plain", SMALL, tensors))
    assert np.abs(plain - found[0]).max() > 1e-2 * plain.std()


def test_old_names_of_gpt2(tmp_path):
    config = gpt2.Config(61, 32, 16, 2, 2, 32)
    tensors = tensors_of(config)
    expected = logits(write(tmp_path / "new", config, tensors))
    old = {key.removeprefix("transformer."): value for key, value in tensors.items()}
    old = {key.replace("ln_f.weight", "ln_f.gamma"): v for key, v in old.items()}
    old["h.0.attn.bias"] = np.tril(np.ones((1, 1, 32, 32), np.float32))
    old["lm_head.weight"] = old["wte.weight"].copy()
    np.testing.assert_array_equal(
        logits(write(tmp_path / "old", config, old)), expected
    )


def test_loads_into_shards_and_reads_each_byte_once(made, monkeypatch):
    _, whole = hf.load(made)
    read = []
    fill = files.Tensor._fill

    def counted(self, file, array):
        read.append(array.nbytes)
        fill(self, file, array)

    monkeypatch.setattr(files.Tensor, "_fill", counted)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), ("x", "y", "z"))
    axes = {"layers/q/kernel": (None, "x", "y"), "layers/o/kernel": (None, "y")}
    axes |= {"embed/embedding": (None, "x"), "layers/up/kernel": ("x", "z", "y")}

    def split(_, shapes):
        return jax.tree_util.tree_map_with_path(
            lambda at, _: NamedSharding(
                mesh, PartitionSpec(*axes.get("/".join(k.key for k in at), ()))
            ),
            shapes,
        )

    _, params = hf.load(made, shardings=split)
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    assert params["layers"]["q"]["kernel"].addressable_shards[0].data.shape[1:3] == (
        16,
        2,
    )
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert sum(read) == size


@pytest.mark.parametrize(
    "index",
    [
        (slice(0, 16), slice(1, 2), slice(0, 8)),
        (slice(8, 24), slice(0, 2), slice(2, 4)),
        (slice(0, 32), slice(0, 2), slice(0, 8)),
    ],
)
def test_any_slice_of_a_kernel(made, index):
    from lorax.interop import leaves

    tensor = files.open_checkpoint(made)["model.layers.1.self_attn.k_proj.weight"]
    entry = hf.table.linear("k", "k", ("embed",), ("kv_heads", "head_dim"))[0]
    whole = tensor.read().T.reshape(32, 2, 8)
    place = hf.table.Location("k/kernel", None, entry)
    part = leaves._slice(tensor, place, whole.shape, list(index))
    np.testing.assert_array_equal(part, whole[index])


def replaced(made, tensors):
    safetensors.numpy.save_file(tensors, made / "model.safetensors")


def test_tensors_must_be_those_of_the_config(made):
    tensors = tensors_of(SMALL)
    gone = tensors.pop("model.norm.weight")
    replaced(made, {**tensors, "model.layers.7.mlp.up_proj.weight": np.zeros(3)})
    with pytest.raises(ValueError, match=r"missing: model.norm.weight; left over: mod"):
        hf.load(made)
    replaced(made, {**tensors, "model.norm.weight": gone[:-1]})
    with pytest.raises(ValueError, match=r"'model.norm.weight' has shape \[31\].*\[32"):
        hf.load(made)
    gone[3] = np.nan
    replaced(made, {**tensors, "model.norm.weight": gone})
    with pytest.raises(ValueError, match="model.norm.weight' holds NaN"):
        hf.load(made)


def test_headers_are_not_believed(made):
    path = made / "model.safetensors"
    sound = path.read_bytes()
    length = int.from_bytes(sound[:8], "little")
    header, body = sound[8 : 8 + length], sound[8 + length :]

    def broken(head, rest=body, size=None):
        size = len(head) if size is None else size
        path.write_bytes(size.to_bytes(8, "little") + head + rest)
        with pytest.raises(ValueError, match="model.safetensors"):
            hf.load(made)

    path.write_bytes(sound[:-10])
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        hf.load(made)
    broken(header, body + b"0000")
    broken(header, size=2**40)
    broken(header, size=120 * 2**20)
    told = json.loads(header)
    first, second = sorted(told)[:2]
    moved = {**told, first: {**told[first], "data_offsets": [0, 2**40]}}
    broken(json.dumps(moved).encode())
    moved = {**told, first: {**told[second]}}
    broken(json.dumps(moved).encode())
    twice = header.replace(b"{", b'{"' + first.encode() + b'": 1, ', 1)
    broken(twice)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        hf.load(made)


def test_json_names_a_key_once(made):
    config = made / "config.json"
    config.write_text(config.read_text().replace("{", '{"hidden_size": 8, ', 1))
    with pytest.raises(ValueError, match=r"config.json: duplicate keys: hidden_size"):
        hf.load(made)
    config.write_text("[1]")
    with pytest.raises(ValueError, match="holds list, not an object"):
        hf.load(made)
    config.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="config.json"):
        hf.load(made)


def test_nothing_leads_out_of_the_directory(made, tmp_path):
    (made / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (made / "model.safetensors").symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(ValueError, match="leads out of its directory"):
        hf.load(made)
    (made / "model.safetensors").unlink()
    index = made / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../outside.safetensors"}}))
    with pytest.raises(ValueError, match="leads out of its directory"):
        hf.load(made)
    index.write_text(json.dumps({"weight_map": {"x": 3}}))
    with pytest.raises(ValueError, match="weight_map"):
        hf.load(made)
    index.unlink()
    (made / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(FileNotFoundError, match="pickle, which can run code"):
        hf.load(made)


def test_a_hub_cache_links_to_its_blobs(made, tmp_path):
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in made.iterdir():
        (blobs / f"blob-{file.name}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(os.path.join("../../blobs/blob-" + file.name))
    np.testing.assert_array_equal(logits(snapshot), logits(made))


def test_index_and_files_agree(made):
    index = made / "model.safetensors.index.json"
    os.rename(made / "model.safetensors", made / "model-1.safetensors")
    where = dict.fromkeys(tensors_of(SMALL), "model-1.safetensors")
    index.write_text(json.dumps({"weight_map": where}))
    hf.load(made)
    where["more"] = "model-1.safetensors"
    index.write_text(json.dumps({"weight_map": where}))
    with pytest.raises(ValueError, match="disagree on more"):
        hf.load(made)
    where["more"] = "model-2.safetensors"
    index.write_text(json.dumps({"weight_map": where}))
    with pytest.raises(FileNotFoundError, match="model-2.safetensors"):
        hf.load(made)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mamba"}, "model_type='mamba' is not implemented.*qwen3"),
        ({"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu' is not implemented"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "'dynamic' is not implemented"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
            "'llama3' lacks low_freq_factor, high_freq_factor, original_max",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "unknown fields .*partial_rotary_factor",
        ),
        ({"logit_softcap": 30.0}, "unknown fields.*logit_softcap=30.0"),
        (
            {"num_key_value_heads": 3},
            "num_key_value_heads=3 does not divide",
        ),
        ({"hidden_size": -3}, "hidden_size=-3; it must be an int >= 1"),
        ({"hidden_size": "32"}, "hidden_size='32'; it must be"),
        ({"model_type": {}}, "config.json: model_type={} is not implemented"),
        ({"model_type": ["llama"]}, r"config.json: model_type=\['llama'\] is not"),
        ({"num_attention_heads": 2**70}, "num_attention_heads=1180591620717411303424"),
        ({"num_attention_heads": 5}, "num_key_value_heads=2 does not divide num_att"),
        ({"head_dim": 7}, "head_dim=7; rotary positions need an even size"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps=-1e-05; it must be a number > 0"),
        ({"rms_norm_eps": False}, "rms_norm_eps=False; it must be a number > 0"),
        ({"tie_word_embeddings": 1.5}, "tie_word_embeddings=1.5; it must be true or"),
        ({"attention_bias": 1}, "attention_bias=1; it must be true or false"),
        ({"sliding_window": True}, "sliding_window=True; it must be an int"),
        ({"layer_types": [[]]}, r"layer_types=\[\[\]\]; it must be a list, each text"),
        ({"rope_theta": "x"}, "rope_theta='x'; it must be a number > 1"),
        ({"rope_parameters": []}, r"rope_parameters=\[\]; it must be an object"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": True}},
            "rope_parameters.factor=True; it must be a number > 0",
        ),
        (
            {"rope_parameters": {"rope_type": {}, "factor": 2}},
            "rope_parameters.rope_type={}; it must be text",
        ),
        (
            {"intermediate_size": None},
            r"requires \[11008, 32\].*intermediate_size=11008 \(absent, so the def",
        ),
        (
            {"layer_types": ["full_attention"]},
            "1 entries for num_hidden_layers=2",
        ),
    ],
)
def test_what_is_not_implemented_is_said(tmp_path, fields, message):
    source = write(tmp_path / "x", SMALL, tensors_of(SMALL), **fields)
    with pytest.raises(ValueError, match=message):
        hf.load(source)


def test_a_switch_that_the_family_lacks(tmp_path):
    source = write(tmp_path / "x", SMALL, tensors_of(SMALL))
    with pytest.raises(ValueError, match="no field 'dispatch'; its fields are .*scan"):
        hf.load(source, dispatch="dense")


def test_unknown_fields_that_switch_nothing_on_are_harmless(tmp_path):
    off = {"logit_softcap": False, "extra": [], "other": {}, "more": ""}
    source = write(tmp_path / "x", SMALL, tensors_of(SMALL), **off)
    config = json.loads((source / "config.json").read_text()) | {"nothing": None}
    (source / "config.json").write_text(json.dumps(config))
    model, params = hf.load(source)
    plain, same = hf.load(write(tmp_path / "y", SMALL, tensors_of(SMALL)))
    assert model.config == plain.config
    jax.tree.map(np.testing.assert_array_equal, params, same)


def test_a_place_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="the directory .* does not exist"):
        hf.load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="config.json"):
        hf.load(tmp_path / "empty")


def test_saving_another_tree_is_refused(made, tmp_path):
    model, params = hf.load(made)
    params.pop("head")
    with pytest.raises(ValueError, match="not the parameters of the model: head"):
        hf.save(tmp_path / "out", model.config, params)


@needs_data
def test_a_real_checkpoint():
    model, params = hf.load(DATA / "stories260k")
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 260_032
    tokens = np.array([[1, 403, 407, 261, 378]])  # "Once upon a time"
    best = model.apply({"params": params}, tokens)[0, -1].argmax()
    assert best == 432  # ","
