"""PEFT files that are damaged or not for this base; by hand, without torch."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lorax
from lorax import compose
from lorax.adapters import Lora
from lorax.interop import peft
from lorax.models import gpt2, llama, vit

CONFIG = llama.Config(31, 64, 16, 2, 4, 2, 4, 24, tied=False)
TIED = gpt2.Config(31, 16, 8, 2, 2, 32)
SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["v_proj"]}
FRONT = "base_model.model."
V = FRONT + "model.layers.{}.self_attn.v_proj.lora_{}.weight"


def tensors(rank=2, dtype=np.float32):
    """Factors of v in two layers."""
    draw = np.random.default_rng(0)
    sizes = {"A": (rank, 16), "B": (8, rank)}
    return {
        V.format(layer, x): draw.standard_normal(sizes[x]).astype(dtype)
        for layer in range(2)
        for x in "AB"
    }


def write(folder, arrays, **fields):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | fields))
    safetensors.numpy.save_file(arrays, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_sound_files(tmp_path, dtype):
    arrays = tensors(dtype=dtype)
    adapters = peft.load(write(tmp_path, arrays), CONFIG)
    (path, lora), *none = adapters.items()
    assert path == "layers/v/kernel" and not none
    assert lora.scale == 2 and lora.layers is None and lora.a.dtype == jnp.float32
    for layer in range(2):
        a, b = (arrays[V.format(layer, x)].astype(np.float32) for x in "AB")
        np.testing.assert_array_equal(lora.a[layer], a.T)
        np.testing.assert_array_equal(lora.b[layer], b.T.reshape(2, 2, 4))


def test_a_model_without_its_head(tmp_path):
    """GPT2Model has no `transformer.` prefix, and PEFT finds no layer numbers in it."""
    key = FRONT + "h.1.attn.c_attn.lora_{}.weight"
    arrays = {key.format("A"): np.ones((2, 8), np.float32)}
    arrays[key.format("B")] = np.ones((24, 2), np.float32)
    write(tmp_path, arrays, target_modules="h.1.*c_attn")
    (lora,) = peft.load(tmp_path, TIED).values()
    assert lora.layers == (1,) and lora.b.shape == (1, 2, 3, 2, 4)


def test_factors_of_a_convolution(tmp_path):
    config = vit.Config("vit", 8, 4, 1, 16, 2, 2, 24)
    module = "vit.embeddings.patch_embeddings.projection"
    shapes = {"A": (2, 1, 4, 4), "B": (16, 2, 1, 1)}
    arrays = {
        f"{FRONT}{module}.lora_{x}.weight": np.ones(shape, np.float32)
        for x, shape in shapes.items()
    }
    write(tmp_path, arrays, target_modules=["projection"])
    with pytest.raises(ValueError, match=f"{module!r} is not a matrix.*leave it out"):
        peft.load(tmp_path, config)
    a, b = jnp.ones((4, 4, 1, 2)), jnp.ones((2, 16))
    factors = {"patches/kernel": Lora(a, b, 1.0, lorax.Axes((0, 1, 2), (3,)))}
    with pytest.raises(ValueError, match=r"Target\(..., exclude='patches/kernel'\)"):
        peft.save(tmp_path, factors, config)


def change(key, array):
    return lambda arrays: arrays.update({key: np.asarray(array, np.float32)})


def drop(key):
    return lambda arrays: arrays.pop(key)


A0, B1 = V.format(0, "A"), V.format(1, "B")
OTHER = FRONT + "model.layers.{}.self_attn.{}.lora_A.weight"


@pytest.mark.parametrize(
    "edit, fields, message",
    [
        (drop(B1), {}, r"layers.1.self_attn.v_proj.lora_B.weight' is absent"),
        (
            lambda arrays: [arrays.pop(V.format(1, x)) for x in "AB"],
            {},
            "no factors for 'model.layers.1.self_attn.v_proj'",
        ),
        (
            change(A0, np.ones((2, 17))),
            {},
            r"v_proj.lora_A.weight' has shape \[2, 17\]",
        ),
        (change(A0, np.full((2, 16), np.nan)), {}, "v_proj.lora_A.weight' holds NaN"),
        (lambda _: None, {"r": 10**9}, r"shape \[2, 16\].*rank 1000000000"),
        (lambda _: None, {"rank_pattern": {"1.*v_proj": 3}}, r"require \[3, 16\]"),
        (lambda _: None, {"target_modules": ["q_proj"]}, "no factors for .*q_proj"),
        (
            lambda _: None,
            {"target_modules": "(.+)+0.*v_proj"},
            "factors for 'model.layers.1.self_attn.v_proj'.* do not select",
        ),
        (
            lambda _: None,
            {"target_modules": "(a+)+b|(.*.*)*(v_proj|x)!"},
            "target_modules, exclude_modules, .* do not select",
        ),
        (
            change(OTHER.format(7, "v_proj"), np.ones((2, 16))),
            {},
            "no 'model.layers.7.self_attn.v_proj'; .*another base.*nearest",
        ),
        (change("x.lora_A.weight", [[1]]), {}, "'x.lora_A.weight': the base .* no 'x'"),
        (
            change(FRONT + "model.layers.0.self_attn.v_proj.lora_E", [[1]]),
            {},
            "no 'model.layers.0.self_attn.v_proj.lora_E'",
        ),
        (
            change(FRONT + "model.norm.weight", np.ones(16)),
            {},
            "norm.weight': modules_to_save does not name it",
        ),
        (
            change(FRONT + "model.norm.weight", np.ones(15)),
            {"modules_to_save": ["norm"]},
            r"shape \[15\], but the base requires \[16\]",
        ),
        (
            lambda _: None,
            {"modules_to_save": ["lm_head"]},
            "names 'lm_head'; 'base_model.model.lm_head.weight' is abs",
        ),
        (
            change(FRONT + "model.layers.0.input_layernorm.weight", np.ones(16)),
            {"modules_to_save": ["0.input_layernorm"]},
            "1 of the 2 layers of 'layers/norm_attn/scale'.*scan=False",
        ),
        (lambda _: None, {"bias": "some"}, "adapter_config.json: bias='some'"),
        (lambda _: None, {"init_lora_weights": "pissa_niter_4"}, "residual=True"),
        (
            lambda _: None,
            {"use_dora": True},
            "vector' is absent: .*in dora form",
        ),
    ],
)
def test_what_is_refused(tmp_path, edit, fields, message):
    arrays = tensors()
    edit(arrays)
    with pytest.raises(ValueError, match=message) as error:
        peft.load(write(tmp_path, arrays, **fields), CONFIG)
    assert str(tmp_path / "adapter_") in str(error.value), "the file is not named"


def test_a_rank_that_no_file_holds(tmp_path):
    arrays = {k.removesuffix(".weight"): t for k, t in tensors().items()}
    for layer in range(2):
        arrays[V.format(layer, "E").removesuffix(".weight")] = np.ones((2, 1))
    fields = {"peft_type": "ADALORA", "init_r": 10**9, "total_step": 5}
    with pytest.raises(ValueError, match="rank 1000000000"):
        peft.load(write(tmp_path, arrays, **fields), CONFIG)
    adapters = peft.load(write(tmp_path, arrays, **fields | {"init_r": 2}), CONFIG)
    assert adapters["layers/v/kernel"].lam.shape == (2, 2)


def test_residual_bases_are_taken_at_their_word(tmp_path):
    write(tmp_path, tensors(), init_lora_weights="pissa_niter_4")
    adapters = peft.load(tmp_path, CONFIG, residual=True)
    assert adapters["layers/v/kernel"].moved_by == "PEFT's pissa_niter_4(rank=2)"
    with pytest.raises(ValueError, match="v/kernel: PEFT's pissa.* residual=True"):
        peft.save(tmp_path / "again", adapters, CONFIG)
    with pytest.raises(ValueError, match="v/kernel: .*the base as PEFT's pissa"):
        compose.negate(adapters)


def test_a_frozen_embedding_that_is_not_the_bases(tmp_path):
    key = FRONT + "model.embed_tokens.base_layer.weight"
    table = np.ones((31, 16), np.float32)
    write(tmp_path, tensors() | {key: table})
    peft.load(tmp_path, CONFIG, {"embed": {"embedding": table}})
    with pytest.raises(ValueError, match="base_layer.weight' differs from the base's"):
        peft.load(tmp_path, CONFIG, {"embed": {"embedding": 2 * table}})


@pytest.mark.parametrize(
    "field, arrays",
    [
        (
            "target_modules",
            {"wte.lora_embedding_A": (2, 31), "wte.lora_embedding_B": (8, 2)},
        ),
        ("target_modules", {"lm_head.lora_A.weight": (2, 8)}),
        ("modules_to_save", {"lm_head.weight": (31, 8)}),
    ],
)
def test_one_half_of_what_is_tied(tmp_path, field, arrays):
    """PEFT leaves the other half frozen; a single leaf cannot be half frozen."""
    front = {"wte": FRONT + "transformer.", "lm_": FRONT}
    found = {front[key[:3]] + key: np.ones(s, np.float32) for key, s in arrays.items()}
    if "lm_head.lora_A.weight" in arrays:
        found[FRONT + "lm_head.lora_B.weight"] = np.ones((31, 2), np.float32)
    names = [key.split(".")[0] for key in arrays][:1]
    fields = {"target_modules": [], field: names}
    with pytest.raises(ValueError, match="tied head separately.*tied=False"):
        peft.load(write(tmp_path, found, **fields), TIED)


def test_files_that_are_not_sound(tmp_path):
    write(tmp_path, tensors())
    file, config = tmp_path / peft.TENSORS, tmp_path / peft.CONFIG
    whole, told = file.read_bytes(), config.read_text()
    file.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is not a valid"):
        peft.load(tmp_path, CONFIG)
    size = int.from_bytes(whole[:8], "little")
    lie = whole[8 : 8 + size].replace(b"[2,16]", b"[9,16]", 1)
    file.write_bytes(whole[:8] + lie + whole[8 + size :])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is not a valid"):
        peft.load(tmp_path, CONFIG)
    file.write_bytes(whole)
    config.write_text(told[:-1] + ', "r": 4}')
    with pytest.raises(ValueError, match="adapter_config.json: duplicate keys: r"):
        peft.load(tmp_path, CONFIG)
    config.unlink()
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        peft.load(tmp_path, CONFIG)


def test_pickles_are_never_read(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(SETTINGS))
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(FileNotFoundError, match="is a pickle.*save_pretrained"):
        peft.load(tmp_path, CONFIG)
