"""Sizes and switches of the Llama family, and its parameters on disk; see `llama`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from lorax import untrusted
from lorax.models import decoder_config, hf_config, rope, table

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "ministral": "MinistralForCausalLM",
    "mistral": "MistralForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}

USUAL: dict[str, dict[str, Any]] = {
    "ministral": {"num_key_value_heads": 8},
    "mistral": {"num_key_value_heads": 8},
    "olmo2": {"rms_norm_eps": 1e-5},
    "phi3": {"rms_norm_eps": 1e-5},
    "smollm3": {
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "rope_theta": 2_000_000.0,
        "tie_word_embeddings": True,
    },
}
"""What transformers assumes for an absent field, where it differs from Llama."""


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
      rope: rates of the rotation.
      tied: the head is the embedding; else `head/kernel`.
      qkv_bias: q, k and v have biases.
      o_bias: o has a bias.
      mlp_bias: gate, up and down have biases.
      qk_norm: q and k are normalised.
      all_heads: these norms are over all heads together.
      post_norms: norms come after attention and MLP, not before them.
      fused: q, k and v are one kernel, and gate and up another.
      turned: for every layer, whether q and k are rotated. Empty: in every layer.
      windows: for every layer, how many tokens a token sees, itself included; 0: all.
        Empty: all, in every layer.
      model_type: of the config.json that `to_hf` writes.
      attention: implementation of `attention.attend` for training: "plain", or "flash"
        for the one that suits the machine; decoding is always plain.
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
    all_heads: bool = False
    post_norms: bool = False
    fused: bool = False
    turned: tuple[bool, ...] = ()
    windows: tuple[int, ...] = ()
    model_type: str = "llama"
    attention: str = "plain"
    scan: bool = True
    remat: str = "none"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.turned and len(self.turned) != self.layers:
            raise ValueError(
                f"turned has {len(self.turned)} entries for {self.layers} layers; give "
                "one each"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **switches: Any) -> Config:
        """Reads a config.json; `switches` set scan, remat, dtype, ..."""
        kind = config.get("model_type", "llama")
        if not isinstance(kind, str) or kind not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(f"config.json: model_type={kind!r} is not one of {known}")
        fields, usual = hf_config.Fields(config, kind), USUAL.get(kind, {})
        width = fields.integer("hidden_size", 4096)
        depth = fields.layers("num_hidden_layers", 32)
        heads = fields.integer(
            "num_attention_heads", usual.get("num_attention_heads", 32)
        )
        shared = fields.integer(
            "num_key_value_heads", usual.get("num_key_value_heads", heads)
        )
        fields.divides(num_key_value_heads=shared, num_attention_heads=heads)
        positions = fields.integer("max_position_embeddings", 4096)
        biased = fields.flag("attention_bias", False)
        if kind in ("mistral", "ministral", "phi3") and biased:
            raise ValueError(f"config.json: attention_bias=True: {kind} has no biases")
        head_dim = _head_dim(fields, heads, width)
        turned = _turned(fields, depth) if kind == "smollm3" else ()
        own = cls(
            vocabulary=fields.integer("vocab_size", 32_000),
            positions=positions,
            width=width,
            layers=depth,
            heads=heads,
            kv_heads=shared,
            head_dim=head_dim,
            hidden=fields.integer("intermediate_size", 11_008),
            activation=fields.activation("hidden_act", "silu"),
            eps=fields.epsilon("rms_norm_eps", usual.get("rms_norm_eps", 1e-6)),
            rope=_rope(fields, kind, positions, head_dim),
            tied=fields.flag(
                "tie_word_embeddings", usual.get("tie_word_embeddings", False)
            ),
            qkv_bias=biased or kind == "qwen2",
            o_bias=biased and kind != "qwen2",
            mlp_bias=kind in MLP_BIASED and fields.flag("mlp_bias", False),
            qk_norm=kind in ("qwen3", "olmo2"),
            all_heads=kind == "olmo2",
            post_norms=kind == "olmo2",
            fused=kind == "phi3",
            turned=() if all(turned) else turned,
            windows=_windows(fields, kind, depth, turned),
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
        if self.model_type in ("llama", "qwen3", "olmo2", "smollm3"):
            written["attention_bias"] = self.qkv_bias
        if self.model_type in MLP_BIASED:
            written["mlp_bias"] = self.mlp_bias
        if self.model_type == "smollm3":
            turned = self.turned or (True,) * self.layers
            written["no_rope_layers"] = [int(own) for own in turned]
        if self.rope.kind == "longrope":
            written["original_max_position_embeddings"] = self.rope.original
        if self.rope.part != 1:
            written["partial_rotary_factor"] = self.rope.part
        return written | _windows_to_hf(self)


MLP_BIASED = ("llama", "smollm3")
"""Model types whose MLP may have biases."""


def _head_dim(fields: hf_config.Fields, heads: int, width: int) -> int:
    """The width of a head, whose halves are rotated together."""
    given = fields.integer("head_dim", None)
    if given is None:
        fields.divides(num_attention_heads=heads, hidden_size=width)
    size = given or width // heads
    if size % 2:
        where = f"config.json: head_dim={size}"
        raise ValueError(f"{where}; rotary positions need an even size")
    return size


def _turned(fields: hf_config.Fields, depth: int) -> tuple[bool, ...]:
    """Which layers rotate q and k; `no_rope_layers` has 1 for those that do."""
    every = fields.integer("no_rope_layer_interval", 4)
    rule = untrusted.listed(untrusted.whole(0, 1))
    given = fields.take("no_rope_layers", rule, None)
    if given is None:
        return tuple(bool((layer + 1) % every) for layer in range(depth))
    if len(given) != depth:
        raise ValueError(
            f"config.json: no_rope_layers has {len(given)} entries for "
            f"num_hidden_layers={depth}"
        )
    return tuple(map(bool, given))


def _rope(
    fields: hf_config.Fields, kind: str, positions: int, head_dim: int
) -> rope.Rope:
    """The rotation; Phi-3 has some of its fields outside the table."""
    if kind != "phi3":
        base = USUAL.get(kind, {}).get("rope_theta", 10_000.0)
        return rope.from_hf(fields, positions, base=base)
    given = fields.left.get("rope_parameters") or fields.left.get("rope_scaling") or {}
    values = dict(
        untrusted.check("config.json: rope_parameters", given, untrusted.TABLE)
    )
    for name in ("type", "rope_type"):
        if values.get(name) in ("su", "yarn"):  # older names of the same
            values[name] = "longrope"
    outer = {
        name: fields.take(name, rope.RULES[name], None)
        for name in ("partial_rotary_factor", "original_max_position_embeddings")
    }
    if "longrope" not in (values.get("rope_type"), values.get("type")):
        outer["original_max_position_embeddings"] = None  # no effect then
    for name, value in outer.items():
        if value is not None and (values.get(name) or value) != value:
            raise ValueError(
                f"config.json: {name} is {value}, but {untrusted.shown(values[name])} "
                "among the fields of the rotation"
            )
        values |= {} if value is None else {name: value}
    fields.left.pop("rope_scaling", None)
    fields.left["rope_parameters"] = values
    found = rope.from_hf(fields, positions, partial=True)
    pairs = int(head_dim * found.part) // 2
    for name, factors in {"short": found.short, "long": found.long}.items():
        if found.kind == "longrope" and len(factors) != pairs:
            raise ValueError(
                f"config.json: {name}_factor has {len(factors)} entries, but with "
                f"head_dim={head_dim} {pairs} pairs are rotated"
            )
    if int(head_dim * found.part) % 2:
        raise ValueError(
            f"config.json: partial_rotary_factor={found.part} of head_dim={head_dim} "
            "must be an even number"
        )
    return found


ALWAYS_WINDOWED = ("mistral", "ministral", "phi3")
"""Model types whose layers all have a window, if a size is given."""


def _windows(
    fields: hf_config.Fields, kind: str, depth: int, turned: tuple[bool, ...]
) -> tuple[int, ...]:
    """The window of every layer, as each model_type spells it."""
    size, always = fields.integer("sliding_window", None, 0), kind in ALWAYS_WINDOWED
    switched = fields.flag("use_sliding_window", always)
    first = fields.integer("max_window_layers", 0 if always else 28, 0)
    slides = fields.windowed(depth)
    if slides is None and kind == "smollm3":
        slides = [switched and not own for own in turned]
    if slides is None:
        slides = [switched and layer >= first for layer in range(depth)]
    if kind in ("llama", "olmo2") or not size or not any(slides):
        return ()
    return tuple(size if own else 0 for own in slides)


def _windows_to_hf(config: Config) -> dict[str, Any]:
    size = max(config.windows, default=0) or None
    if config.model_type in ("mistral", "phi3"):
        return {"sliding_window": size}
    if config.model_type in ("llama", "olmo2"):
        return {}
    windows = config.windows or (0,) * config.layers
    if config.model_type in ("ministral", "smollm3"):
        kinds = hf_config.layer_types(windows)
        told = {"sliding_window": size, "layer_types": kinds}
        switched = {"use_sliding_window": size is not None}
        return told if config.model_type == "ministral" else told | switched
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
"""A layer's norms by their names on disk."""


POST_NORMS = {
    "post_attention_layernorm": "norm_attn",
    "post_feedforward_layernorm": "norm_mlp",
}
"""Likewise with `post_norms`."""


def entries(config: Config) -> tuple[table.Entry, ...]:
    """Returns the table of parameters."""
    norms = POST_NORMS if config.post_norms else NORMS
    mlp = _fused_mlp() if config.fused else decoder_config.gated_mlp(config.mlp_bias)
    return decoder_config.entries(config, norms, mlp, o_bias=config.o_bias)


def _fused_mlp() -> tuple[table.Entry, ...]:
    width, hidden = ("embed",), ("mlp",)
    return (
        *table.linear("mlp.gate_up_proj", "gate_up", width, (None, *hidden)),
        *table.linear("mlp.down_proj", "down", hidden, width),
    )
