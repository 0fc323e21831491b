"""Sizes and switches of Gemma 4, and its parameters on disk; see `gemma4`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from lorax import untrusted
from lorax.models import decoder_config, gemma_config, hf_config, rope, table

MODEL_TYPE = "gemma4_text"


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
      far_kv_heads: `kv_heads` in layers that see all.
      far_head_dim: `head_dim` in layers that see all.
      hidden: width of the MLP.
      activation: of the gate, by its Hugging Face name.
      eps: of the norms.
      local_rope: rates of the rotation in layers with a window.
      rope: likewise in layers that see all.
      windows: for every layer, how many tokens a token sees, itself included; 0: all.
      sharing: how many of the last layers use keys and values of the last layer of
        their kind that has its own.
      wide: the MLPs of these layers are twice as wide.
      k_is_v: layers that see all have one kernel for keys and values.
      extra: width of the token embedding that each layer has of its own; 0: none.
      extra_vocabulary: number of tokens of that embedding.
      logit_cap: bound on the logits; None: no bound.
      qkv_bias: q, k, v and o have biases.
      tied: the head is the embedding; else `head/kernel`.
      attention: "plain", or for training another of `attention.attend`, as "flash".
      scan: periods of layers are stacked on axis 0.
      remat: see `lorax.models.remat`.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    vocabulary: int = 262_144
    positions: int = 131_072
    width: int = 2304
    layers: int = 30
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 256
    far_kv_heads: int = 4
    far_head_dim: int = 512
    hidden: int = 9216
    activation: str = "gelu_pytorch_tanh"
    eps: float = 1e-6
    local_rope: rope.Rope = rope.Rope()
    rope: rope.Rope = rope.Rope(1e6, "proportional", part=0.25)
    windows: tuple[int, ...] = (*(512,) * 5, 0) * 5
    sharing: int = 0
    wide: bool = False
    k_is_v: bool = False
    extra: int = 256
    extra_vocabulary: int = 262_144
    logit_cap: float | None = None
    qkv_bias: bool = False
    tied: bool = True
    attention: str = "plain"
    scan: bool = True
    remat: str = "none"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    qk_norm = True  # what `decoder_config.layer_entries` asks of every family

    def __post_init__(self) -> None:
        super().__post_init__()
        hf_config.require_divisor(far_kv_heads=self.far_kv_heads, heads=self.heads)
        if not self.windows:
            raise ValueError(f"give each of the {self.layers} layers a window, or 0")
        own = self.layers - self.sharing
        alone = {bool(w) for w in self.windows} - {bool(w) for w in self.windows[:own]}
        if alone:
            kind = hf_config.layer_types([alone.pop()])[0]
            raise ValueError(
                f"sharing={self.sharing} of {self.layers} layers: none of the first "
                f"{own} is of the kind {kind!r}, whose keys the last ones need"
            )

    @property
    def stacks(self) -> dict[str, int]:
        """Periods in every stack: of layers with keys of their own, and of others."""
        found = {"layers": self.layers - self.sharing, "sharing": self.sharing}
        return {k: n // len(self.period(k)) for k, n in found.items() if n}

    def period(self, stack: str) -> tuple[int, ...]:
        """Returns the windows of one period of a stack, the shortest that repeats."""
        own = self.layers - self.sharing
        windows = self.windows[own:] if stack == "sharing" else self.windows[:own]
        sizes = (n for n in range(1, len(windows) + 1) if len(windows) % n == 0)
        return next(
            windows[:n] for n in sizes if windows == windows[:n] * (len(windows) // n)
        )

    @property
    def unread(self) -> tuple[str, ...]:
        """Unused tensors on disk: keys and values of layers that use another's."""
        numbers = "|".join(map(str, range(self.layers - self.sharing, self.layers)))
        return (rf"model\.layers\.({numbers})\.self_attn\.[kv]_(proj|norm)\..*",)

    def heads_of(self, window: int) -> tuple[int, int]:
        """Returns the number and size of key heads in a layer with this window."""
        if window:
            return self.kv_heads, self.head_dim
        return self.far_kv_heads, self.far_head_dim

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **switches: Any) -> Config:
        """Reads a config.json; `switches` set scan, remat, dtype, ..."""
        fields = hf_config.Fields(config, MODEL_TYPE)
        fields.expect(enable_moe_block=False)
        heads = fields.integer("num_attention_heads", 8)
        shared = fields.integer("num_key_value_heads", 4)
        head_dim = fields.integer("head_dim", 256)
        fields.divides(num_key_value_heads=shared, num_attention_heads=heads)
        depth = fields.layers("num_hidden_layers", 30)
        positions = fields.integer("max_position_embeddings", 131_072)
        windows = _windows(fields, depth)
        k_is_v = fields.flag("attention_k_eq_v", False)
        far_heads, far_dim = _far_heads(fields, windows, shared, head_dim, k_is_v)
        fields.divides(num_global_key_value_heads=far_heads, num_attention_heads=heads)
        for name, size in {"head_dim": head_dim, "global_head_dim": far_dim}.items():
            if size % 2:
                where = f"config.json: {name}={size}"
                raise ValueError(f"{where}; rotary positions need an even size")
        local, far = _ropes(fields, positions)
        own = cls(
            vocabulary=fields.integer("vocab_size", 262_144),
            positions=positions,
            width=fields.integer("hidden_size", 2304),
            layers=depth,
            heads=heads,
            kv_heads=shared,
            head_dim=head_dim,
            far_kv_heads=far_heads,
            far_head_dim=far_dim,
            hidden=fields.integer("intermediate_size", 9216),
            activation=fields.activation("hidden_activation", cls.activation),
            eps=fields.epsilon("rms_norm_eps", 1e-6),
            local_rope=local,
            rope=far,
            windows=windows,
            sharing=fields.integer("num_kv_shared_layers", 0, 0, depth - 1),
            wide=fields.flag("use_double_wide_mlp", False),
            k_is_v=k_is_v,
            extra=fields.integer("hidden_size_per_layer_input", 256, 0),
            extra_vocabulary=fields.integer("vocab_size_per_layer_input", 262_144),
            logit_cap=fields.cap("final_logit_softcapping", None),
            qkv_bias=fields.flag("attention_bias", False),
            tied=fields.flag("tie_word_embeddings", True),
            **switches,
        )
        if fields.left.get("use_bidirectional_attention") != "vision":  # text is causal
            fields.expect(use_bidirectional_attention=None)
        fields.finish("use_bidirectional_attention", *EXPERTS)
        return own

    def to_hf(self) -> dict[str, Any]:
        """Returns the fields of a config.json that transformers reads."""
        ropes = {"full_attention": self.rope, "sliding_attention": self.local_rope}
        return {
            "architectures": ["Gemma4ForCausalLM"],
            "model_type": MODEL_TYPE,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "num_global_key_value_heads": self.far_kv_heads if self.k_is_v else None,
            "global_head_dim": self.far_head_dim,
            "intermediate_size": self.hidden,
            "hidden_activation": self.activation,
            "rms_norm_eps": self.eps,
            "num_kv_shared_layers": self.sharing,
            "use_double_wide_mlp": self.wide,
            "attention_k_eq_v": self.k_is_v,
            "hidden_size_per_layer_input": self.extra,
            "vocab_size_per_layer_input": self.extra_vocabulary,
            "final_logit_softcapping": self.logit_cap,
            "attention_bias": self.qkv_bias,
            "tie_word_embeddings": self.tied,
            "sliding_window": max(self.windows) or 512,
            "layer_types": hf_config.layer_types(self.windows),
            "rope_parameters": {
                kind: rope.to_hf(own)["rope_parameters"] for kind, own in ropes.items()
            },
        }


EXPERTS = ("num_experts", "top_k_experts", "moe_intermediate_size")
"""Fields that have no effect without `enable_moe_block`."""


def _windows(fields: hf_config.Fields, depth: int) -> tuple[int, ...]:
    """The window of every layer; the last one sees all, whatever its kind."""
    size = fields.integer("sliding_window", 512)
    slides = fields.windowed(depth)
    if slides is None:
        slides = [bool((layer + 1) % 6) for layer in range(depth)]
    return (*(size if own else 0 for own in slides[:-1]), 0)


def _far_heads(
    fields: hf_config.Fields,
    windows: Sequence[int],
    kv_heads: int,
    head_dim: int,
    k_is_v: bool,
) -> tuple[int, int]:
    """Number and size of key heads in layers that see all.

    transformers has fields for them, and from 5.24 on writes them layer by layer.
    """
    far = fields.integer("num_global_key_value_heads", None) if k_is_v else None
    fields.left.pop("num_global_key_value_heads", None)  # no effect without k_is_v
    usual = far or kv_heads, fields.integer("global_head_dim", 512)
    layers = fields.take("per_layer_config", untrusted.TABLE, {})
    if not layers:
        return usual
    rule = untrusted.whole(1)
    found = set()
    for layer, window in enumerate(windows):
        where = f"config.json: per_layer_config.{layer}"
        own = dict(untrusted.check(where, layers.pop(str(layer), {}), untrusted.TABLE))
        size = untrusted.check(where, own.pop("head_dim", head_dim), rule)
        count = untrusted.check(where, own.pop("num_key_value_heads", kv_heads), rule)
        if own or (window and (count, size) != (kv_heads, head_dim)):
            raise ValueError(
                f"{where}: only head_dim and num_key_value_heads of layers that see "
                "all are known"
            )
        found |= set() if window else {(count, size)}
    if layers or len(found) > 1:
        raise ValueError(
            "config.json: per_layer_config must give all layers that see all the "
            f"same heads, and no other layers; found {sorted(found)}, {[*layers]}"
        )
    return found.pop()


def _ropes(fields: hf_config.Fields, positions: int) -> tuple[rope.Rope, rope.Rope]:
    """The rotations of layers with a window, and of those that see all."""
    tables = decoder_config.rope_tables(fields)
    if not any(tables.values()):
        return Config.local_rope, Config.rope
    for kind, values in tables.items():
        need = {"rope_type", "rope_theta"}
        if values.get("rope_type") == "proportional":
            need |= {"partial_rotary_factor"}
        if absent := sorted(need - set(values)):
            raise ValueError(
                f"config.json: rope_parameters.{kind} lacks {', '.join(absent)}"
            )
    local, far = (
        decoder_config.rope_of(fields, positions, kind, tables[kind])
        for kind in ("sliding_attention", "full_attention")
    )
    return local, far


def entries(config: Config) -> tuple[table.Entry, ...]:
    """Returns the table of parameters."""
    mlp, norms = decoder_config.gated_mlp(False), gemma_config.NORMS[True]
    block = decoder_config.layer_entries(config, norms, mlp, o_bias=config.qkv_bias)
    block.append(table.Entry("layer_scalar", "scalar", (None,), inputs=0))
    whole: list[table.Entry] = []
    if config.extra:
        block += table.linear("per_layer_input_gate", "extra_gate", ("embed",), (None,))
        block += table.linear("per_layer_projection", "extra_up", (None,), ("embed",))
        block += table.rms_norm("post_per_layer_input_norm", "norm_extra")
        whole += [
            table.Entry(
                "model.embed_tokens_per_layer.weight",
                "embed_extra/embedding",
                ("vocab", None),
            ),
            *table.linear(
                "model.per_layer_model_projection", "extra", ("embed",), (None,)
            ),
            *table.rms_norm("model.per_layer_projection_norm", "norm_extra"),
        ]
    first = 0
    for stack, periods in config.stacks.items():
        period = config.period(stack)
        end = first + periods * len(period)
        for i, window in enumerate(period):
            absent = {"k", "v", "norm_k"} if stack == "sharing" else set()
            absent |= {"v"} if config.k_is_v and not window else set()
            own = [e for e in block if e.path.partition("/")[0] not in absent]
            numbers = range(first + i, end, len(period))
            whole += [
                entry._replace(numbers=numbers)
                for entry in table.inside("model.layers.{}", f"{stack}{{}}/at_{i}", own)
            ]
        first = end
    return decoder_config.around(config, whole)
