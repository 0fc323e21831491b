"""Sizes and switches of Gemma 1, 2 and 3, and their parameters on disk; see `gemma`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from lorax import untrusted
from lorax.models import decoder_config, hf_config, rope, table

ARCHITECTURES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}

USUAL: dict[str, dict[str, Any]] = {
    "gemma": {
        "vocab_size": 256_000,
        "max_position_embeddings": 8192,
        "hidden_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 24_576,
    },
    "gemma2": {
        "vocab_size": 256_000,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window_pattern": 2,
    },
    "gemma3_text": {
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "sliding_window_pattern": 6,
    },
}
"""What transformers assumes for an absent field, where the model types differ."""

SIZES = {
    "hidden_size": 2304,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 9216,
}
"""Likewise, for Gemma 2 and 3 alike."""


@dataclasses.dataclass(frozen=True)
class Config(decoder_config.Decoder):
    """Sizes and switches.

    Attributes:
      vocabulary: number of tokens.
      positions: longest sequence in training; nothing here depends on it.
      width: of the residual stream.
      layers: number of blocks.
      heads: number of query heads.
      kv_heads: number of key and value heads; it divides `heads`.
      head_dim: width of a head.
      hidden: width of the MLP.
      activation: of the gate, by its Hugging Face name.
      eps: of the norms.
      local_rope: rates of the rotation in layers with a window.
      rope: likewise in layers that see all.
      windows: for every layer, how many tokens a token sees, itself included; 0: all.
      query_scale: scores are divided by its square root.
      soft_cap: bound on the scores; None: no bound.
      logit_cap: bound on the logits; None: no bound.
      qk_norm: q and k are normalised.
      post_norms: the outputs of attention and MLP are normalised too.
      qkv_bias: q, k, v and o have biases.
      tied: the head is the embedding; else `head/kernel`.
      model_type: of the config.json that `to_hf` writes.
      attention: "plain", or for training another of `attention.attend`, as "flash".
      scan: layers are stacked on axis 0.
      remat: see `lorax.models.remat`.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    vocabulary: int = 256_000
    positions: int = 8192
    width: int = 2304
    layers: int = 26
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 256
    hidden: int = 9216
    activation: str = "gelu_pytorch_tanh"
    eps: float = 1e-6
    local_rope: rope.Rope = rope.Rope()
    rope: rope.Rope = rope.Rope()
    windows: tuple[int, ...] = (4096, 0) * 13
    query_scale: int = 256
    soft_cap: float | None = 50.0
    logit_cap: float | None = 30.0
    qk_norm: bool = False
    post_norms: bool = True
    qkv_bias: bool = False
    tied: bool = True
    model_type: str = "gemma2"
    attention: str = "plain"
    scan: bool = True
    remat: str = "none"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.windows:
            raise ValueError(f"give each of the {self.layers} layers a window, or 0")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **switches: Any) -> Config:
        """Reads a config.json; `switches` set scan, remat, dtype, ..."""
        kind = config.get("model_type", "gemma2")
        if not isinstance(kind, str) or kind not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(f"config.json: model_type={kind!r} is not one of {known}")
        fields, usual = hf_config.Fields(config, kind), SIZES | USUAL[kind]
        heads, shared = (
            fields.integer(name, usual[name])
            for name in ("num_attention_heads", "num_key_value_heads")
        )
        fields.divides(num_key_value_heads=shared, num_attention_heads=heads)
        head_dim = fields.integer("head_dim", 256)
        if head_dim % 2:
            where = f"config.json: head_dim={head_dim}"
            raise ValueError(f"{where}; rotary positions need an even size")
        depth = fields.layers("num_hidden_layers", usual["num_hidden_layers"])
        positions, vocabulary, width, hidden = (
            fields.integer(name, usual[name])
            for name in (
                "max_position_embeddings",
                "vocab_size",
                "hidden_size",
                "intermediate_size",
            )
        )
        whole, local = _ropes(fields, positions, kind)
        own = cls(
            vocabulary=vocabulary,
            positions=positions,
            width=width,
            layers=depth,
            heads=heads,
            kv_heads=shared,
            head_dim=head_dim,
            hidden=hidden,
            activation=_activation(fields, kind),
            eps=fields.epsilon("rms_norm_eps", 1e-6),
            rope=whole,
            local_rope=local,
            qk_norm=kind == "gemma3_text",
            post_norms=kind != "gemma",
            qkv_bias=fields.flag("attention_bias", False),
            tied=fields.flag("tie_word_embeddings", True),
            model_type=kind,
            **_attention(fields, kind, depth, head_dim),
            **switches,
        )
        fields.expect(use_bidirectional_attention=False)
        fields.finish("hidden_act", "cache_implementation")
        return own

    def to_hf(self) -> dict[str, Any]:
        """Returns the fields of a config.json that transformers 4 and 5 read."""
        written = {
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
            "hidden_activation": self.activation,
            "rms_norm_eps": self.eps,
            "attention_bias": self.qkv_bias,
            "tie_word_embeddings": self.tied,
            **_ropes_to_hf(self),
        }
        if self.model_type == "gemma":
            return written | {"hidden_act": self.activation}
        return written | {
            "query_pre_attn_scalar": self.query_scale,
            "attn_logit_softcapping": self.soft_cap,
            "final_logit_softcapping": self.logit_cap,
            "sliding_window": max(self.windows) or None,
            "layer_types": hf_config.layer_types(self.windows),
        }


def _activation(fields: hf_config.Fields, kind: str) -> str:
    """The gate's activation, for which transformers has two fields in Gemma 1."""
    usual = Config.activation
    if kind != "gemma":
        return fields.activation("hidden_activation", usual)
    if fields.left.get("hidden_act") == "gelu":  # the first files' name of `usual`
        fields.left["hidden_act"] = usual
    older = fields.activation("hidden_act", usual)
    newer = fields.activation("hidden_activation", older)
    if newer != older:
        raise ValueError(
            f"config.json: hidden_act={older!r} and hidden_activation={newer!r}: "
            "make them the same"
        )
    return newer


def _attention(
    fields: hf_config.Fields, kind: str, depth: int, head_dim: int
) -> dict[str, Any]:
    """Windows, scale and caps, which Gemma 1 lacks."""
    if kind == "gemma":
        plain = {"soft_cap": None, "logit_cap": None}
        return {"windows": (0,) * depth, "query_scale": head_dim, **plain}
    soft_cap = fields.cap(
        "attn_logit_softcapping", USUAL[kind]["attn_logit_softcapping"]
    )
    if kind == "gemma3_text" and soft_cap is not None:
        raise ValueError(
            f"config.json: attn_logit_softcapping={soft_cap}: transformers has it "
            "only for gemma2; make it null"
        )
    return {
        "windows": _windows(fields, depth, USUAL[kind]["sliding_window_pattern"]),
        "query_scale": fields.integer("query_pre_attn_scalar", 256),
        "soft_cap": soft_cap,
        "logit_cap": fields.cap(
            "final_logit_softcapping", USUAL[kind]["final_logit_softcapping"]
        ),
    }


def _windows(fields: hf_config.Fields, depth: int, every: int) -> tuple[int, ...]:
    """The window of every layer, from its kind or from a repeating pattern."""
    size = fields.integer("sliding_window", 4096)
    every = fields.integer("sliding_window_pattern", every)
    every = fields.integer("_sliding_window_pattern", every)
    slides = fields.windowed(depth)
    if slides is None:
        slides = [bool((layer + 1) % every) for layer in range(depth)]
    return tuple(size if own else 0 for own in slides)


def _ropes(
    fields: hf_config.Fields, positions: int, kind: str
) -> tuple[rope.Rope, rope.Rope]:
    """The rotations of layers that see all, and of those with a window."""
    if kind != "gemma3_text":
        own = rope.from_hf(fields, positions)
        return own, own
    bases = {
        name: fields.take(name, rope.RULES["rope_theta"], None)
        for name in ("rope_theta", "rope_local_base_freq")
    }
    scaling = fields.take("rope_scaling", untrusted.TABLE, {})
    tables = decoder_config.rope_tables(fields)

    def of(kind: str, name: str, usual: float, scaling: Any) -> rope.Rope:
        values, base = scaling | tables[kind], bases[name]
        if base is not None and values.setdefault("rope_theta", base) != base:
            where = f"config.json: rope_parameters.{kind}"
            stated = untrusted.shown(values["rope_theta"])
            raise ValueError(f"{where}.rope_theta is {stated}, but {name} is {base}")
        values.setdefault("rope_theta", usual)
        return decoder_config.rope_of(fields, positions, kind, values)

    return (
        of("full_attention", "rope_theta", 1e6, dict(scaling)),
        of("sliding_attention", "rope_local_base_freq", 1e4, {}),
    )


def _ropes_to_hf(config: Config) -> dict[str, Any]:
    whole = rope.to_hf(config.rope)
    if config.model_type != "gemma3_text":
        return whole
    local = rope.to_hf(config.local_rope)
    if "rope_scaling" in local:
        raise ValueError(
            f"local_rope={config.local_rope}: gemma3 stretches the rotation of layers "
            "that see all, not of those with a window"
        )
    tables = {
        "full_attention": whole.pop("rope_parameters"),
        "sliding_attention": local["rope_parameters"],
    }
    base = {"rope_local_base_freq": config.local_rope.base}
    return {**whole, **base, "rope_parameters": tables}


NORMS = {
    True: {
        "input_layernorm": "norm_attn",
        "post_attention_layernorm": "norm_attn_out",
        "pre_feedforward_layernorm": "norm_mlp",
        "post_feedforward_layernorm": "norm_mlp_out",
    },
    False: {
        "input_layernorm": "norm_attn",
        "post_attention_layernorm": "norm_mlp",
    },
}
"""A layer's norms by their names on disk; True: with those of `post_norms`."""


def entries(config: Config) -> tuple[table.Entry, ...]:
    """Returns the table of parameters."""
    norms, mlp = NORMS[config.post_norms], decoder_config.gated_mlp(bias=False)
    return decoder_config.entries(config, norms, mlp, o_bias=config.qkv_bias)
