"""Sizes and switches of RoBERTa and BERT, and their tensors on disk."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp

from lorax.models import hf_config, table

Family = Literal["roberta", "bert"]
Head = Literal["classification", "mlm", "none"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and switches; the defaults are RoBERTa-base.

    Attributes:
      family: "roberta": positions count the real tokens before a token; "bert": all of
        them. It also sets the names of tensors on disk.
      vocabulary: number of tokens.
      positions: rows of the position embedding.
      offset: the row of the first token. RoBERTa: 1 + the padding token; BERT: 0.
      types: number of token types.
      width: of the residual stream.
      layers: number of blocks.
      heads: number of attention heads; it divides the width.
      hidden: width of the MLP.
      activation: of the MLP, by its Hugging Face name.
      eps: of the layer norms.
      head: "classification" of the first token; "mlm": masked tokens, through the
        embedding; "none": hidden states, as for the sentence encoders of
        `lorax.models.pooling`.
      labels: number of classes.
      dropout: in training, rate on embeddings, on what blocks add and in the
        classifier; attention weights have none.
      scan: layers are stacked on axis 0.
      remat: see `lorax.models.remat`.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    family: Family = "roberta"
    vocabulary: int = 50265
    positions: int = 514
    offset: int = 2
    types: int = 1
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    activation: str = "gelu"
    eps: float = 1e-5
    head: Head = "classification"
    labels: int = 2
    dropout: float = 0.0
    scan: bool = True
    remat: str = "none"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        """Checks the offset and the heads."""
        hf_config.require_divisor(heads=self.heads, width=self.width)
        first = "0" if self.family == "bert" else "1 + padding token"
        if (self.offset > 0) == (self.family == "bert"):
            name = {"bert": "BERT", "roberta": "RoBERTa"}[self.family]
            raise ValueError(
                f"offset={self.offset}: {name}'s first token is in row {first}"
            )

    @property
    def stacks(self) -> dict[str, int]:
        """Number of layers in every stack."""
        return {"layers": self.layers}

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **switches: Any) -> Config:
        """Reads a config.json; `switches` set head, dropout, scan, ...

        Without `head`, the name in `architectures` decides; a bare encoder has none,
        or a classification head with `labels`.
        """
        family = config.get("model_type")
        if family not in ("roberta", "bert"):
            raise ValueError(
                f"config.json: model_type={family!r}; this family reads 'roberta' and "
                "'bert'"
            )
        fields = hf_config.Fields(config, family)
        roberta = family == "roberta"
        fields.expect(
            position_embedding_type="absolute",
            is_decoder=False,
            is_encoder_decoder=False,
            add_cross_attention=False,
            tie_word_embeddings=True,
            pruned_heads={},
            directionality="bidi",
        )
        positions = fields.integer("max_position_embeddings", 512, 2)
        padding = fields.integer("pad_token_id", int(roberta), 0, positions - 2)
        width = fields.integer("hidden_size", 768)
        heads = fields.integer("num_attention_heads", 12)
        fields.divides(num_attention_heads=heads, hidden_size=width)
        own = cls(
            family=family,
            vocabulary=fields.integer("vocab_size", 50265 if roberta else 30522),
            positions=positions,
            offset=padding + 1 if roberta else 0,
            types=fields.integer("type_vocab_size", 2),
            width=width,
            layers=fields.layers("num_hidden_layers", 12),
            heads=heads,
            hidden=fields.integer("intermediate_size", 3072),
            activation=fields.activation("hidden_act", "gelu"),
            eps=fields.epsilon("layer_norm_eps", 1e-12),
            head=fields.head(switches, HEAD_NAMES),
            labels=switches.pop("labels", None) or fields.labels(),
            **switches,
        )
        pooler = "fc_size num_attention_heads num_fc_layers size_per_head type"
        fields.finish(*(f"pooler_{name}" for name in pooler.split()))
        return own

    def to_hf(self) -> dict[str, Any]:
        """Returns the fields of a config.json."""
        name = {"roberta": "Roberta", "bert": "Bert"}[self.family]
        return {
            "architectures": [name + ARCHITECTURES[self.head]],
            "model_type": self.family,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
            "pad_token_id": max(self.offset - 1, 0),
            "type_vocab_size": self.types,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.hidden,
            "hidden_act": self.activation,
            "layer_norm_eps": self.eps,
            **hf_config.label_names(self.labels),
        }


HEAD_NAMES: dict[str, Head] = {
    "ForMaskedLM": "mlm",
    "ForPreTraining": "mlm",
    "ForSequenceClassification": "classification",
    "Model": "none",
}
"""Suffixes of names in `architectures`, and the heads that they mean."""

ARCHITECTURES: dict[str, str] = {
    "classification": "ForSequenceClassification",
    "mlm": "ForMaskedLM",
    "none": "Model",
}
"""For each head, what follows the name of the family in `architectures`."""


OLDER_NORMS = ((r"(.*)\.gamma$", r"\1.weight"), (r"(.*)\.beta$", r"\1.bias"))
ALIASES = ((r"(embeddings|encoder|pooler)\.", r"roberta.\1."), *OLDER_NORMS)
"""Older names on disk, as `(regex of a prefix, replacement)`."""

HEADS = ("classifier_.*",)
"""Paths that a checkpoint may lack; `interop.hf.load` then draws them."""

IGNORED = (
    r".*\.position_ids",
    r"roberta\.pooler\..*",
    r"lm_head\..*",
    r"classifier\..*",
)
"""What this model may leave unread: buffers, copies of the embedding, a pooler that
nothing reads, and the head that was not chosen."""


def within(config: Config) -> tuple[table.Entry, ...]:
    """Returns the table of parameters for an encoder inside a model with a head."""
    root = config.family
    at = f"{root}.embeddings"
    return (
        table.embedding(f"{at}.word_embeddings", "embed"),
        table.embedding(f"{at}.position_embeddings", "embed_positions", rows=None),
        table.embedding(f"{at}.token_type_embeddings", "embed_types", rows=None),
        *table.layer_norm(f"{at}.LayerNorm", "norm_embed"),
        *table.inside(f"{root}.encoder.layer.{{}}", "layers{}", block_entries()),
        *_head_entries(config),
    )


def entries(config: Config) -> tuple[table.Entry, ...]:
    """Returns the table of parameters; a bare encoder's names have no family prefix."""
    whole = within(config)
    return table.bare(whole, config.family) if config.head == "none" else whole


FURTHER = (within,)
"""Other tables that a checkpoint may follow."""


def block_entries(
    query: str = "query", key: str = "key", value: str = "value"
) -> list[table.Entry]:
    """Returns the entries of one layer, whose projections have these names on disk."""
    heads, width, hidden = ("heads", "head_dim"), ("embed",), ("mlp",)
    linear = functools.partial(table.linear, bias=True)
    return [
        *linear(f"attention.self.{query}", "q", width, heads),
        *linear(f"attention.self.{key}", "k", width, heads),
        *linear(f"attention.self.{value}", "v", width, heads),
        *linear("attention.output.dense", "o", heads, width),
        *table.layer_norm("attention.output.LayerNorm", "norm_attn"),
        *linear("intermediate.dense", "up", width, hidden),
        *linear("output.dense", "down", hidden, width),
        *table.layer_norm("output.LayerNorm", "norm_mlp"),
    ]


def _head_entries(config: Config) -> tuple[table.Entry, ...]:
    roberta, width = config.family == "roberta", ("embed",)
    linear = functools.partial(table.linear, bias=True)
    if config.head == "none":
        return ()
    if config.head == "classification":
        dense = "classifier.dense" if roberta else "bert.pooler.dense"
        out = "classifier.out_proj" if roberta else "classifier"
        return (
            *linear(dense, "classifier_dense", width, (None,)),
            *linear(out, "classifier_out", width, (None,)),
        )
    at = "lm_head" if roberta else "cls.predictions"
    deep = at if roberta else f"{at}.transform"
    norm = "layer_norm" if roberta else "LayerNorm"
    return (
        *linear(f"{deep}.dense", "mlm_dense", width, (None,)),
        *table.layer_norm(f"{deep}.{norm}", "mlm_norm"),
        table.Entry(f"{at}.bias", "mlm_bias", ("vocab",), inputs=0),
    )
