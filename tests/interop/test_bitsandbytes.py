"""Checkpoints in bitsandbytes codes: by hand, by transformers, and damaged ones."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax.interop import hf
from lorax.models import gpt2, llama
from lorax.quantized import NestedScales, Quantized, codebooks
from tests.interop.test_hf import tensors_of, write

pytestmark = pytest.mark.once

CONFIG = llama.Config(61, 64, 64, 2, 4, 2, 16, 192, tied=False)
GPT2 = gpt2.Config(61, 32, 64, 1, 4, 128)
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
STATE = "quant_state.bitsandbytes__nf4"


def packed(key, weight, nested=True, size=64):
    """The tensors of one packed weight, and its decoded values in float64."""
    flat = weight.astype(np.float32).ravel()
    blocks = np.pad(flat, (0, -flat.size % size)).reshape(-1, size)
    absmax = np.abs(blocks).max(1)
    table = codebooks.NF4
    codes = np.abs((blocks / absmax[:, None])[..., None] - table).argmin(-1)
    codes = codes.ravel()[: flat.size].astype(np.uint8)
    state = {"quant_type": "nf4", "blocksize": size, "dtype": "float16"}
    state["shape"] = weight.shape
    held = {"": (codes[::2] << 4 | codes[1::2])[:, None], ".quant_map": table}
    if nested:
        dynamic, offset = codebooks.dynamic_map(), float(absmax.mean())
        rest = np.pad(absmax - offset, (0, -absmax.size % 256)).reshape(-1, 256)
        above = np.abs(rest).max(1).astype(np.float32)
        small = np.abs((rest / above[:, None])[..., None] - dynamic).argmin(-1)
        values = dynamic[small] * above[:, None].astype(np.float64) + offset
        small = small.ravel()[: absmax.size].astype(np.uint8)
        absmax = values.ravel()[: absmax.size]
        held |= {".absmax": small, ".nested_absmax": above}
        held[".nested_quant_map"] = dynamic
        state |= {"nested_blocksize": 256, "nested_dtype": "float32"}
        state["nested_offset"] = offset
    else:
        held[".absmax"] = absmax
    text = json.dumps(state).encode()
    held[f".{STATE}"] = np.frombuffer(text, np.uint8)
    dense = table[codes] * np.repeat(absmax.astype(np.float64), size)[: flat.size]
    return {key + end: array for end, array in held.items()}, dense.reshape(
        weight.shape
    )


def eight_bits(key, weight):
    largest = np.abs(weight).max(1).astype(np.float32)
    codes = np.round(weight * (127 / largest[:, None])).astype(np.int8)
    dense = codes * (largest.astype(np.float64) / 127)[:, None]
    name = key.removesuffix("weight")
    form = np.zeros((), np.uint8)
    return {key: codes, f"{name}SCB": largest, f"{name}weight_format": form}, dense


def coded(config, code, skipped=("lm_head", "embed", "wte", "wpe", "norm", "ln_")):
    """A float16 checkpoint in codes, and one with the weights they stand for."""
    small, dense = {}, {}
    for key, tensor in tensors_of(config, dtype=np.float16).items():
        linear = tensor.ndim == 2 and not any(word in key for word in skipped)
        if not linear:
            small[key] = dense[key] = tensor
            continue
        # for a Conv1D, [in, out] on disk, transformers stores the codes of [out, in]
        conv = isinstance(config, gpt2.Config)
        tensor = np.ascontiguousarray(tensor.T) if conv else tensor
        parts, weights = code(key, tensor)
        small |= parts
        dense[key] = np.ascontiguousarray(weights.T if conv else weights)
    return small, dense


def compare(tmp_path, config, code, told, scan=True):
    """Checks that every leaf decodes to its weights; returns the leaves in codes."""
    small, dense = coded(config, code)
    _, found = hf.load(
        write(tmp_path / "small", config, small, quantization_config=told), scan=scan
    )
    dense = {key: tensor.astype(np.float32) for key, tensor in dense.items()}
    _, want = hf.load(write(tmp_path / "dense", config, dense), scan=scan)
    found, want = lorax.tree.flatten(found), lorax.tree.flatten(want)
    assert found.keys() == want.keys()
    for path, leaf in found.items():
        values = np.asarray(jnp.asarray(leaf), np.float32)
        np.testing.assert_allclose(values, want[path], rtol=2**-11, atol=1e-6)
    leaves = {p: leaf for p, leaf in found.items() if isinstance(leaf, Quantized)}
    assert all(leaf.dtype == jnp.float16 for leaf in leaves.values())
    return leaves


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("config", [CONFIG, GPT2])
@pytest.mark.parametrize("nested", [True, False])
def test_nf4_by_hand(tmp_path, nested, config, scan):
    code = functools.partial(packed, nested=nested)
    leaves = compare(tmp_path, config, code, NF4, scan)
    assert len(leaves) == (7 if config is CONFIG else 4) * (
        1 if scan else config.layers
    )
    for leaf in leaves.values():
        assert leaf.codebook == "nf4" and leaf.codes.dtype == jnp.uint8
        assert isinstance(leaf.scales, NestedScales) == nested
        assert 8 * leaf.nbytes / leaf.size < (4.3 if nested else 4.51)


@pytest.mark.parametrize("config", [CONFIG, GPT2])
def test_int8_by_hand(tmp_path, config):
    leaves = compare(tmp_path, config, eight_bits, INT8)
    assert all(leaf.codes.dtype == jnp.int8 for leaf in leaves.values())


def test_blocks_that_run_over_rows(tmp_path):
    """48 features: a block holds one row and a third of the next."""
    config = llama.Config(61, 64, 48, 1, 4, 4, 12, 80, tied=True)
    leaves = compare(tmp_path, config, packed, NF4)
    assert leaves["layers/up/kernel"].scales.shape == (1, 3, 80)  # tiles of 16
    # the inputs of o are heads of 12, and no tile crosses them
    assert leaves["layers/o/kernel"].scales.shape == (1, 4, 3, 48)


def test_bytes_that_are_called_floats(tmp_path):
    """`bnb_4bit_quant_storage`, in which some bit patterns are NaN."""
    small, _ = coded(CONFIG, packed)
    source = write(tmp_path / "a", CONFIG, small, quantization_config=NF4)
    _, want = hf.load(source)
    for key, tensor in small.items():
        if f"{key}.{STATE}" in small:
            small[key] = tensor.reshape(-1).view(jnp.bfloat16)[:, None]
    source = write(tmp_path / "b", CONFIG, small, quantization_config=NF4)
    jax.tree.map(np.testing.assert_array_equal, hf.load(source)[1], want)


def test_a_head_and_adapters_on_codes(tmp_path):
    """The model runs; the head is in codes too, if it is in the file."""
    skipped = ("embed", "norm")
    config = dataclasses.replace(CONFIG, layers=1)
    small, _ = coded(config, packed, skipped)
    source = write(tmp_path / "a", config, small, quantization_config=NF4)
    model, params = hf.load(source, dtype=jnp.float32)
    assert isinstance(params["head"]["kernel"], Quantized)
    run = lambda params, x: model.apply({"params": params}, x).astype(jnp.float32)
    tokens = jnp.arange(8)[None]
    kernels = lorax.discover(run, params, tokens)
    target = lorax.Target(".*/(up|o)/kernel", rank=2)
    adapters, params = lorax.init(jax.random.key(0), params, target, kernels)
    found = lorax.adapt(run)(adapters, params, tokens)
    want = run(lorax.merge(adapters, params), tokens)
    np.testing.assert_allclose(found, want, atol=0.02 * float(jnp.abs(want).max()))


def transformers_model(folder, **fields):
    """Weights of a toy that transformers has written in codes, and decodes itself."""
    torch = pytest.importorskip("torch", reason="needs the golden extra")
    transformers = pytest.importorskip("transformers", reason="needs the golden extra")
    bnb = pytest.importorskip("bitsandbytes", reason="needs the golden extra")
    plain = tensors_of(CONFIG, dtype=np.float16)
    write(folder / "plain", CONFIG, plain)
    options = transformers.BitsAndBytesConfig(**fields)
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(
        folder / "plain", quantization_config=options, device_map="cpu"
    )
    model.save_pretrained(folder / "small")
    dense = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, bnb.nn.Linear4bit):
            decode = bnb.functional.dequantize_4bit
            dense[f"{name}.weight"] = decode(weight.data, weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            decode = bnb.functional.int8_vectorwise_dequant
            dense[f"{name}.weight"] = decode(weight.data, weight.SCB).half()
        elif weight is not None:
            dense[f"{name}.weight"] = weight.data
    with torch.no_grad():
        logits = model(torch.arange(8)[None]).logits.float().numpy()
    return {key: tensor.numpy() for key, tensor in dense.items()}, logits


@pytest.mark.parametrize(
    "fields, atol",
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 2e-2),
        (
            {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
            },
            2e-2,
        ),
        ({"load_in_8bit": True}, 0.1),  # which also rounds activations
    ],
    ids=["nf4", "nf4 nested", "int8"],
)
def test_what_transformers_writes(tmp_path, fields, atol):
    dense, logits = transformers_model(tmp_path, **fields)
    model, params = hf.load(tmp_path / "small", dtype=jnp.float32)
    _, want = hf.load(write(tmp_path / "dense", CONFIG, dense))
    found, want = lorax.tree.flatten(params), lorax.tree.flatten(want)
    for path, leaf in found.items():  # up to float16 rounding
        np.testing.assert_allclose(jnp.asarray(leaf), want[path], rtol=2**-10)
    assert sum(isinstance(leaf, Quantized) for leaf in found.values()) == 7
    run = lambda params, x: model.apply({"params": params}, x)
    ours = lorax.adapt(run)({}, params, jnp.arange(8)[None])
    np.testing.assert_allclose(ours, logits, atol=atol * np.abs(logits).max())


KEY = "model.layers.0.mlp.up_proj.weight"


def changed(tensors, name, **fields):
    """The JSON of a matrix with changed fields; None removes one."""
    key = f"{name}.{STATE}"
    state = json.loads(tensors[key].tobytes()) | fields
    state = {name: value for name, value in state.items() if value is not None}
    return {key: np.frombuffer(json.dumps(state).encode(), np.uint8)}


DAMAGES = {
    "no absmax": (
        lambda t: {f"{KEY}.absmax": None},
        "but no '.*up_proj.*absmax'",
    ),
    "no codes": (lambda t: {KEY: None}, f"but no '{KEY}'"),
    "no state": (
        lambda t: {f"{KEY}.{STATE}": None},
        "dtype uint8.*scales are missing",
    ),
    "short codes": (lambda t: {KEY: t[KEY][:-1]}, "has 6143 bytes, but .* 192 by 64"),
    "short absmax": (
        lambda t: {f"{KEY}.absmax": t[f"{KEY}.absmax"][1:]},
        "absmax' is uint8 of shape .191.*it must be 192 values of uint8",
    ),
    "absmax of floats": (
        lambda t: {f"{KEY}.absmax": t[f"{KEY}.absmax"].astype(np.float32)},
        "absmax' is float32.*it must be 192 values of uint8",
    ),
    "long nested": (
        lambda t: {f"{KEY}.nested_absmax": np.ones(2, np.float32)},
        "nested_absmax' is float32 of shape .2.*it must be 1 values",
    ),
    "NaN": (
        lambda t: {f"{KEY}.nested_absmax": np.full(1, np.nan, np.float32)},
        "nested_absmax' holds NaN",
    ),
    "zero": (
        lambda t: {f"{KEY}.nested_absmax": np.zeros(1, np.float32)},
        "nested_absmax': the scales are all zero",
    ),
    "negative": (
        lambda t: {f"{KEY}.nested_absmax": -np.ones(1, np.float32)},
        "nested_absmax': the scales have a negative value",
    ),
    "another table": (
        lambda t: {f"{KEY}.quant_map": t[f"{KEY}.quant_map"] ** 3},
        "quant_map' is not the table",
    ),
    "blocks of 48": (
        lambda t: changed(t, KEY, blocksize=48),
        "blocksize=48; it",
    ),
    "blocks of true": (lambda t: changed(t, KEY, blocksize=True), "blocksize=True; it"),
    "no dtype": (lambda t: changed(t, KEY, dtype=None), "there is no 'dtype' in it"),
    "int dtype": (lambda t: changed(t, KEY, dtype="int8"), "dtype='int8'; it must be"),
    "three sizes": (
        lambda t: changed(t, KEY, shape=[192, 8, 8]),
        "must be two sizes",
    ),
    "turned": (
        lambda t: changed(t, KEY, shape=[64, 192]),
        r"shape \[64, 192\], but",
    ),
    "infinite": (
        lambda t: changed(t, KEY, nested_offset=1e999),
        "nested_offset=inf; it",
    ),
    "unknown": (lambda t: changed(t, KEY, zero_point=1), "unknown fields: zero_point"),
    "not JSON": (
        lambda t: {f"{KEY}.{STATE}": np.arange(9, dtype=np.uint8)},
        f"{STATE}'",
    ),
    "fp4": (
        lambda t: {f"{KEY}.quant_state.bitsandbytes__fp4": t[f"{KEY}.{STATE}"]},
        "codes of fp4 are not supported.*quantize='nf4'",
    ),
}


@pytest.fixture(scope="module")
def small():
    return coded(CONFIG, packed)[0]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files(tmp_path, small, damage):
    change, message = DAMAGES[damage]
    tensors = {**small, **change(small)}
    tensors = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    source = write(tmp_path / "a", CONFIG, tensors, quantization_config=NF4)
    with pytest.raises(ValueError, match=message):
        hf.load(source)


def test_damaged_int8(tmp_path):
    whole, _ = coded(CONFIG, eight_bits)
    layer = KEY.removesuffix("weight")

    def raises(message, **changes):
        tensors = {**whole, **{layer + name: value for name, value in changes.items()}}
        tensors = {key: tensor for key, tensor in tensors.items() if tensor is not None}
        source = write(tmp_path / "a", CONFIG, tensors, quantization_config=INT8)
        with pytest.raises(ValueError, match=message):
            hf.load(source)

    raises("dtype int8.*scales are missing: .*neither .* nor .*up_proj.SCB", SCB=None)
    raises("SCB' is float32 of shape .191.*192 values", SCB=np.ones(191, np.float32))
    raises("SCB' holds NaN", SCB=np.full(192, np.nan, np.float32))
    raises("SCB': the scales are all zero", SCB=np.zeros(192, np.float32))
    raises("rows are not in order", weight_format=np.ones((), np.uint8))
    raises("must be int8 with two axes", weight=np.ones((192, 64), np.float16))


@pytest.mark.parametrize("method", ["awq", "gptq", "fp8", "compressed-tensors", None])
def test_other_methods_are_refused_by_name(tmp_path, method):
    told = {"quant_method": method, "bits": 4}
    source = write(tmp_path / "a", CONFIG, tensors_of(CONFIG), quantization_config=told)
    said = f"quant_method={method!r} is not supported, only 'bits.*hf.load.*quantize="
    with pytest.raises(ValueError, match=said):
        hf.load(source)


def test_what_does_not_go_together(tmp_path, small):
    plain = tensors_of(CONFIG, dtype=np.float16)
    source = write(tmp_path / "a", CONFIG, plain, quantization_config=NF4)
    with pytest.raises(ValueError, match="no tensor is quantised; remove the field"):
        hf.load(source)
    rest = {k: v for k, v in small.items() if not k.startswith(KEY)}
    mixed = {**rest, KEY: plain[KEY]}
    source = write(tmp_path / "b", CONFIG, mixed, quantization_config=NF4)
    with pytest.raises(ValueError, match=f"'{KEY}' is dense and .*load with scan=F"):
        hf.load(source)
    _, params = hf.load(source, scan=False)
    assert not isinstance(params["layers_0"]["up"]["kernel"], Quantized)
    assert isinstance(params["layers_1"]["up"]["kernel"], Quantized)
    source = write(tmp_path / "c", CONFIG, small, quantization_config=NF4)
    with pytest.raises(ValueError, match="already quantised; leave quantize="):
        hf.load(source, quantize="nf4")
    other, _ = packed(KEY, plain[KEY].astype(np.float32), nested=False)
    some = {**rest, **other}
    source = write(tmp_path / "d", CONFIG, some, quantization_config=NF4)
    with pytest.raises(
        ValueError, match="is stored differently from .*with scan=False"
    ):
        hf.load(source)
