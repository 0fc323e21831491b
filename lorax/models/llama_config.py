"""Sizes and switches of the Llama family, and its parameters on disk; see `llama`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from lorax.models import decoder_config, hf_config, rope, table

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@dataclasses.dataclass(frozen=True)
class Config(decoder_config.Decoder):
    """Sizes and switches.

    Attributes:
      vocabulary: number of tokens.
      positions: longest sequence of the training; nothing here depends on it.
      width: of the residual stream.
      layers: blocks.
      heads: heads of the queries.
      kv_heads: heads of keys and values; they divide `heads`.
      head_dim: size of a head.
      hidden: width of the MLP.
      activation: of the gate, by its Hugging Face name.
      eps: of the norms.
      rope: rates of the rotation.
      tied: the head is the embedding; else `head/kernel`.
      qkv_bias: q, k and v have biases.
      o_bias: o has one.
      mlp_bias: gate, up and down have them.
      qk_norm: q and k are normed.
      windows: of every layer, the number of tokens it sees, itself included; 0 for
        all. Empty: every layer sees all.
      model_type: whose config.json `to_hf` writes.
      attention: "plain"; or as `attention.attend` has it for training: "flash" is what
        suits the machine; decoding is plain.
      scan: layers are stacked on axis 0.
      remat: see `lorax.models.remat`.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    vocabulary: int = 32_000
    positions: int = 4096
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    hidden: int = 11_008
    activation: str = "silu"
    eps: float = 1e-6
    rope: rope.Rope = rope.Rope()
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int, ...] = ()
    model_type: str = "llama"
    attention: str = "plain"
    scan: bool = True
    remat: str = "none"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **switches: Any) -> Config:
        """Returns what a config.json says; `switches` are scan, remat, dtype, ..."""
        kind = config.get("model_type", "llama")
        if not isinstance(kind, str) or kind not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(f"config.json: model_type={kind!r} is not one of {known}")
        fields = hf_config.Fields(config, kind)
        width = fields.integer("hidden_size", 4096)
        depth = fields.layers("num_hidden_layers", 32)
        heads = fields.integer("num_attention_heads", 32)
        shared = 8 if kind == "mistral" else heads
        shared = fields.integer("num_key_value_heads", shared)
        fields.divides(num_key_value_heads=shared, num_attention_heads=heads)
        positions = fields.integer("max_position_embeddings", 4096)
        biased = fields.flag("attention_bias", False)
        if kind == "mistral" and biased:
            raise ValueError("config.json: attention_bias=True: mistral has no biases")
        own = cls(
            vocabulary=fields.integer("vocab_size", 32_000),
            positions=positions,
            width=width,
            layers=depth,
            heads=heads,
            kv_heads=shared,
            head_dim=_head_dim(fields, heads, width),
            hidden=fields.integer("intermediate_size", 11_008),
            activation=fields.activation("hidden_act", "silu"),
            eps=fields.epsilon("rms_norm_eps", 1e-6),
            rope=rope.from_hf(fields, positions),
            tied=fields.flag("tie_word_embeddings", False),
            qkv_bias=biased or kind == "qwen2",
            o_bias=biased and kind != "qwen2",
            mlp_bias=kind == "llama" and fields.flag("mlp_bias", False),
            qk_norm=kind == "qwen3",
            windows=_windows(fields, kind, depth),
            model_type=kind,
            **switches,
        )
        fields.finish()
        return own

    def to_hf(self) -> dict[str, Any]:
        """Returns the fields of a config.json that transformers 4 and 5 read."""
        written: dict[str, Any] = {
            "architectures": [ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.hidden,
            "hidden_act": self.activation,
            "rms_norm_eps": self.eps,
            "tie_word_embeddings": self.tied,
            **rope.to_hf(self.rope),
        }
        if self.model_type in ("llama", "qwen3"):
            written["attention_bias"] = self.qkv_bias
        if self.model_type == "llama":
            written["mlp_bias"] = self.mlp_bias
        return written | _windows_to_hf(self)


def _head_dim(fields: hf_config.Fields, heads: int, width: int) -> int:
    """The size of a head, whose halves the rotation turns together."""
    given = fields.integer("head_dim", None)
    if given is None:
        fields.divides(num_attention_heads=heads, hidden_size=width)
    size = given or width // heads
    if size % 2:
        where = f"config.json: head_dim={size}"
        raise ValueError(f"{where}; rotary positions need an even one")
    return size


def _windows(fields: hf_config.Fields, kind: str, depth: int) -> tuple[int, ...]:
    """The window of every layer, as each model_type spells it."""
    size = fields.integer("sliding_window", None, 0)
    switched = fields.flag("use_sliding_window", kind == "mistral")
    first = fields.integer("max_window_layers", 0 if kind == "mistral" else 28, 0)
    slides = fields.windowed(depth)
    if slides is None:
        slides = [switched and layer >= first for layer in range(depth)]
    if kind == "llama" or not size or not any(slides):
        return ()
    return tuple(size if own else 0 for own in slides)


def _windows_to_hf(config: Config) -> dict[str, Any]:
    size = max(config.windows, default=0) or None
    if config.model_type == "mistral":
        return {"sliding_window": size}
    if config.model_type == "llama":
        return {}
    windows = config.windows or (0,) * config.layers
    first = windows.index(size) if size else config.layers
    return {
        "sliding_window": size,
        "use_sliding_window": size is not None,
        "max_window_layers": first,
        "layer_types": hf_config.layer_types(windows),
    }


NORMS = {
    "input_layernorm": "norm_attn",
    "post_attention_layernorm": "norm_mlp",
}
"""Of a layer, by their names on disk."""


def entries(config: Config) -> tuple[table.Entry, ...]:
    """Returns the table of parameters."""
    mlp = decoder_config.gated_mlp(config.mlp_bias)
    return decoder_config.entries(config, NORMS, mlp, o_bias=config.o_bias)
