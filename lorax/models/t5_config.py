"""T5's sizes and switches, and its parameters on disk; the model is in `t5`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from lorax import untrusted
from lorax.models import hf_config, table


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and switches; the defaults are T5-small.

    Attributes:
      vocabulary: number of tokens.
      width: of the residual stream.
      layers: number of blocks of the encoder.
      decoder_layers: number of blocks of the decoder.
      heads: number of attention heads.
      head_dim: width of a head; heads * head_dim need not be the model's width.
      hidden: width of the MLP.
      activation: of the MLP, by its Hugging Face name.
      gated: the MLP is `down(activation(gate(x)) * up(x))`, as in version 1.1.
      buckets: of relative positions; in the encoder, half of them are for later keys.
      max_distance: from here on, all distances share a bucket.
      eps: of the RMS norms.
      tied: the head is the embedding; else `head/kernel`, without a scale.
      start: token that the decoder begins with.
      dropout: in training, rate on embeddings, on what blocks add and on the output of
        each stack; attention weights and the MLP have none.
      scan: layers are stacked on axis 0.
      remat: see `lorax.models.remat`.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    vocabulary: int = 32128
    width: int = 512
    layers: int = 6
    decoder_layers: int = 6
    heads: int = 8
    head_dim: int = 64
    hidden: int = 2048
    activation: str = "relu"
    gated: bool = False
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    tied: bool = True
    start: int = 0
    dropout: float = 0.0
    scan: bool = True
    remat: str = "none"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @property
    def stacks(self) -> dict[str, int]:
        """Number of layers in every stack."""
        return {"encoder/layers": self.layers, "decoder/layers": self.decoder_layers}

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **switches: Any) -> Config:
        """Reads a config.json; `switches` set dropout, scan, ..."""
        fields = hf_config.Fields(config, "t5")
        vocabulary = fields.integer("vocab_size", 32128)
        deep = fields.layers("num_layers", 6)
        activation, gated = _mlp(fields)
        buckets, distance = _buckets(fields)
        own = cls(
            vocabulary=vocabulary,
            width=fields.integer("d_model", 512),
            layers=deep,
            decoder_layers=fields.layers("num_decoder_layers", deep),
            heads=fields.integer("num_heads", 8),
            head_dim=fields.integer("d_kv", 64),
            hidden=fields.integer("d_ff", 2048),
            activation=activation,
            gated=gated,
            buckets=buckets,
            max_distance=distance,
            eps=fields.epsilon("layer_norm_epsilon", 1e-6),
            tied=_tied(fields),
            start=_start(fields, vocabulary),
            **switches,
        )
        fields.expect(is_encoder_decoder=True, is_decoder=False, pruned_heads={})
        fields.expect(tie_encoder_decoder=False, add_cross_attention=False)
        fields.finish("n_positions", "output_past")  # nothing reads either
        return own

    def to_hf(self) -> dict[str, Any]:
        """Returns the fields of a config.json."""
        name = self.activation
        if self.gated:  # this name means the approximate gelu
            name = {"gelu_new": "gelu"}.get(name, name)
        return {
            "architectures": ["T5ForConditionalGeneration"],
            "model_type": "t5",
            "is_encoder_decoder": True,
            "vocab_size": self.vocabulary,
            "d_model": self.width,
            "num_layers": self.layers,
            "num_decoder_layers": self.decoder_layers,
            "num_heads": self.heads,
            "d_kv": self.head_dim,
            "d_ff": self.hidden,
            "feed_forward_proj": f"gated-{name}" if self.gated else name,
            "dense_act_fn": self.activation,
            "is_gated_act": self.gated,
            "relative_attention_num_buckets": self.buckets,
            "relative_attention_max_distance": self.max_distance,
            "layer_norm_epsilon": self.eps,
            "tie_word_embeddings": self.tied,
            "scale_decoder_outputs": self.tied,
            "decoder_start_token_id": self.start,
            "pad_token_id": 0,
        }


def _mlp(fields: hf_config.Fields) -> tuple[str, bool]:
    """The MLP's activation, and whether it is gated."""
    named = fields.take("feed_forward_proj", untrusted.TEXT, "relu")
    gated = named.startswith("gated-")
    name = "gelu_new" if named == "gated-gelu" else named.removeprefix("gated-")
    # transformers also writes both as fields of their own, which take precedence
    return fields.activation("dense_act_fn", name), fields.flag("is_gated_act", gated)


def _buckets(fields: hf_config.Fields) -> tuple[int, int]:
    """The number of buckets and the largest distance.

    Half of the causal buckets hold one distance each, and the others reach beyond. The
    bucket of every distance is tabled, so the largest is bounded.
    """
    count = fields.integer("relative_attention_num_buckets", 32, 4, 2**16)
    name = "relative_attention_max_distance"
    return count, fields.integer(name, 128, count // 2 + 1, 2**20)


def _start(fields: hf_config.Fields, vocabulary: int) -> int:
    """The token that the decoder begins with."""
    padding = fields.integer("pad_token_id", 0, 0, vocabulary - 1)
    return fields.integer("decoder_start_token_id", padding, 0, vocabulary - 1)


def _tied(fields: hf_config.Fields) -> bool:
    """Whether the head is the embedding, and scaled: one switch in both T5 versions.

    From version 5 on, transformers writes `tie_word_embeddings=true` for every T5, and
    `scale_decoder_outputs` tells the versions apart.
    """
    tied = fields.flag("tie_word_embeddings", True)
    return fields.flag("scale_decoder_outputs", tied)


IGNORED = (
    r"(encoder|decoder)\.embed_tokens\.weight",
    r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
)
"""Copies of the embedding, and a bias of older checkpoints that nothing reads."""


def entries(config: Config) -> tuple[table.Entry, ...]:
    """Returns the table of parameters."""
    whole = [
        table.embedding("shared", "embed"),
        *_stack("encoder", config, cross=False),
        *_stack("decoder", config, cross=True),
    ]
    if not config.tied:
        whole += table.linear("lm_head", "head", ("embed",), ("vocab",))
    return tuple(whole)


def _stack(name: str, config: Config, *, cross: bool) -> list[table.Entry]:
    mlp = 2 if cross else 1
    block = [
        *_attention("layer.0.SelfAttention", ""),
        *table.rms_norm("layer.0.layer_norm", "norm_attn"),
        *_mlp_entries(f"layer.{mlp}.DenseReluDense", config),
        *table.rms_norm(f"layer.{mlp}.layer_norm", "norm_mlp"),
    ]
    if cross:
        block += _attention("layer.1.EncDecAttention", "cross_")
        block += table.rms_norm("layer.1.layer_norm", "norm_cross")
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return [
        table.Entry(
            f"{name}.{bias}", f"{name}/relative_bias/embedding", (None, "heads")
        ),
        *table.inside(f"{name}.block.{{}}", f"{name}/layers{{}}", block),
        *table.rms_norm(f"{name}.final_layer_norm", f"{name}/norm_out"),
    ]


def _attention(key: str, path: str) -> list[table.Entry]:
    heads, width = ("heads", "head_dim"), ("embed",)
    entries: list[table.Entry] = []
    for name in "qkv":
        entries += table.linear(f"{key}.{name}", f"{path}{name}", width, heads)
    return [*entries, *table.linear(f"{key}.o", f"{path}o", heads, width)]


def _mlp_entries(key: str, config: Config) -> list[table.Entry]:
    names = {"wi_0": "gate", "wi_1": "up"} if config.gated else {"wi": "up"}
    entries: list[table.Entry] = []
    for name, path in names.items():
        entries += table.linear(f"{key}.{name}", path, ("embed",), ("mlp",))
    return [*entries, *table.linear(f"{key}.wo", "down", ("mlp",), ("embed",))]
