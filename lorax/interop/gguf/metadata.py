"""Converts the metadata of a GGUF model to the fields of a config.json."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from lorax import untrusted
from lorax.interop.gguf.blocks import Type
from lorax.interop.gguf.header import Header
from lorax.models import hf_config, llama, rope

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Supported architectures; llama.cpp's "llama" includes Mistral."""

SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
"""Keys, without the architecture, and the corresponding fields of a config.json."""

_COUNT = untrusted.whole(1)
_RULES = {
    "block_count": untrusted.whole(1, hf_config.MOST_LAYERS),
    "attention.layer_norm_rms_epsilon": untrusted.number(above=0, below=1),
    "rope.freq_base": rope.RULES["rope_theta"],
}
_OPTIONAL = {"attention.head_count_kv", "attention.key_length", "rope.freq_base"}
_SCALING = {
    "type": ("rope_type", untrusted.choice("none", "linear", "yarn")),
    "factor": ("factor", rope.RULES["factor"]),
    "original_context_length": ("original_max_position_embeddings", _COUNT),
    "yarn_beta_fast": ("beta_fast", rope.RULES["beta_fast"]),
    "yarn_beta_slow": ("beta_slow", rope.RULES["beta_slow"]),
}
_READ = {
    *SIZES,
    *(f"rope.scaling.{name}" for name in _SCALING),
    *("attention.value_length", "rope.dimension_count", "vocab_size"),
}
_HARMLESS = {"rope.scaling.finetuned", "tensor_data_layout"}
_ONLY = {
    "attention.causal": True,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
}
"""Keys of which only one value is implemented."""
_LLAMA3 = rope.Rope(kind="llama3", original=8192, low=1.0, high=4.0)
"""Every Llama from 3.1 to 3.3 has these, and a factor of 8 or 32."""


def architecture(header: Header) -> str:
    """Returns the architecture of a model.

    Raises:
      ValueError: the file does not hold a complete model, or one of another family.
    """
    what = header.field("general.type", untrusted.TEXT, "model")
    if what != "model":
        raise ValueError(
            f"{header.path}: general.type={untrusted.shown(what)}, but this loads "
            "models; for an adapter, use gguf.load_adapters"
        )
    if header.field("split.count", untrusted.whole(), 1) > 1:
        raise ValueError(
            f"{header.path}: split.count={header.metadata['split.count']}, so this is "
            "one of several files; join them with llama-gguf-split --merge"
        )
    name = header.field("general.architecture", untrusted.TEXT)
    if name not in ARCHITECTURES:
        raise ValueError(
            f"{header.path}: general.architecture={untrusted.shown(name)} is not "
            f"implemented; supported are {', '.join(ARCHITECTURES)}"
        )
    return name


def config(header: Header, **switches: Any) -> llama.Config:
    """Returns the model's config; `switches` are scan, remat, dtype, ...

    Raises:
      ValueError: a key is missing, impossible or not implemented; the message names it.
    """
    kind = architecture(header)
    if "token_embd.weight" not in header.tensors:
        raise ValueError(f"{header.path}: there is no tensor 'token_embd.weight'")
    fields = _fields(header, kind)
    fields |= {
        "model_type": kind,
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    if kind == "llama":
        fields["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
        fields["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    try:
        found = llama.Config.from_hf(fields, **switches)
    except ValueError as error:
        told = str(error).removeprefix("config.json: ")
        for key, field in SIZES.items():
            told = told.replace(f"{field}=", f"{kind}.{key}=")
        raise ValueError(f"{header.path}: {told}") from error
    _agrees(header, kind, found)
    return _with_factors(header, found)


def _fields(header: Header, kind: str) -> dict[str, Any]:
    """The fields given by keys of the file, none of which is silently ignored."""
    fields = {}
    for key, field in SIZES.items():
        rule, name = _RULES.get(key, _COUNT), f"{kind}.{key}"
        if name in header.metadata or key not in _OPTIONAL:
            fields[field] = _shortest(header.field(name, rule))
    scaling = {}
    for key, (field, rule) in _SCALING.items():
        name = f"{kind}.rope.scaling.{key}"
        if name in header.metadata:
            scaling[field] = _shortest(header.field(name, rule))
    if scaling.get("rope_type", "none") != "none":
        fields["rope_scaling"] = scaling
    _require_known(header, kind)
    return fields


def _shortest(value: Any) -> Any:
    """A float32 as its shortest decimal: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _require_known(header: Header, kind: str) -> None:
    """Raises ValueError for an unknown key that may change the architecture."""
    odd = {}
    for name, value in header.metadata.items():
        key = name.removeprefix(f"{kind}.")
        if key == name or key in _READ | _HARMLESS:
            continue
        if key in _ONLY:
            fine = value == _ONLY[key]
        else:
            fine = untrusted.ZERO.fits(value) or value == 0
        if not fine:
            odd[name] = value
    if odd:
        shown = ", ".join(f"{k}={untrusted.shown(v)}" for k, v in odd.items())
        raise ValueError(
            f"{header.path}: keys that may change the architecture and are not "
            f"implemented: {shown}; load the model that the file was made from with "
            "hf.load"
        )


def _agrees(header: Header, kind: str, found: llama.Config) -> None:
    """Raises ValueError if keys and tensors disagree.

    Afterwards no size exceeds that of a tensor in the file, whatever the keys say.
    """
    last = f"blk.{found.layers - 1}"
    sizes = {
        "token_embd.weight": (found.vocabulary, found.width),
        f"{last}.attn_q.weight": (found.heads * found.head_dim, found.width),
        f"{last}.ffn_up.weight": (found.hidden, found.width),
    }
    for name, need in sizes.items():
        if name not in header.tensors:
            raise ValueError(
                f"{header.path}: there is no tensor {name!r}, but the metadata has "
                f"{kind}.block_count={found.layers}"
            )
        if (shape := header.tensors[name].shape) != need:
            raise ValueError(misshapen(header, name, shape, need, kind))
    said = {
        "attention.value_length": found.head_dim,
        "rope.dimension_count": found.head_dim,
        "vocab_size": found.vocabulary,
    }
    for key, size in said.items():
        given = header.field(f"{kind}.{key}", _COUNT, size)
        if given != size:
            raise ValueError(
                f"{header.path}: {kind}.{key}={given} is not implemented if the other "
                f"keys and tensors give {size}"
            )


def misshapen(
    header: Header, name: str, shape: tuple[int, ...], need: tuple[int, ...], kind: str
) -> str:
    """Returns the message for a tensor whose shape does not fit its model."""
    told = [f"{kind}.{key}" for key in SIZES]
    said = ", ".join(f"{k}={header.metadata[k]}" for k in told if k in header.metadata)
    return (
        f"{header.path}: {name!r} has shape {list(shape)}, but the metadata requires "
        f"{list(need)}: {said}"
    )


def _with_factors(header: Header, found: llama.Config) -> llama.Config:
    """The config with Llama 3's rates, which a file stores as a tensor of factors."""
    if "rope_freqs.weight" not in header.tensors:
        return found
    where = f"{header.path}: 'rope_freqs.weight'"
    stored, plain = header.tensors["rope_freqs.weight"], found.rope
    if plain.kind != "default":
        raise ValueError(
            f"{where} cannot be combined with rope.scaling.type={plain.kind!r}"
        )
    if stored.shape != (found.head_dim // 2,) or stored.kind != Type.F32:
        raise ValueError(
            f"{where} is {stored.kind.name} {list(stored.shape)}, not F32 "
            f"[{found.head_dim // 2}], a factor for each pair"
        )
    factors = stored.raw.read().astype(np.float64)
    own = dataclasses.replace(_LLAMA3, base=plain.base, factor=float(factors.max()))
    size = found.head_dim
    expected = plain.rates(size) / own.rates(size)
    if factors.min() <= 0 or not np.allclose(factors, expected, rtol=1e-4):
        raise ValueError(
            f"{where} does not hold the factors of Llama 3 with an original length of "
            f"{own.original}; load the model that the file was made from with hf.load"
        )
    return dataclasses.replace(found, rope=own)
