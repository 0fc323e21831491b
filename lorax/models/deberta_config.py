"""DeBERTa's config.json, and the names of its parameters on disk."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp

from lorax import untrusted
from lorax.models import hf_config, roberta_config, table

Head = Literal["classification", "none"]
TERMS = ("c2p", "p2c")


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and switches; the defaults are DeBERTa-v3-base.

    Attributes:
      vocabulary: number of tokens.
      positions: longest sequence if `absolute`.
      absolute: tokens have position embeddings.
      types: number of token types; 0: none.
      width: of the residual stream.
      layers: number of blocks.
      heads: number of attention heads; it divides the width.
      hidden: width of the MLP.
      activation: of the MLP, by its Hugging Face name.
      eps: of the layer norms.
      terms: some of TERMS; without any there are no distance embeddings.
      buckets: of distances to one side; 0: one per distance up to `max_distance`.
      max_distance: from here on, distances share one row.
      shared: the projections of content also serve distances.
      norm_distances: distance embeddings pass a layer norm.
      head: "classification" of the first token; "none": hidden states.
      labels: number of classes.
      pooled: activation of the classifier.
      dropout: in training, rate on embeddings, on what blocks add and in the
        classifier; attention weights have none.
      scan: layers are stacked on axis 0.
      remat: see `lorax.models.remat`.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    vocabulary: int = 128100
    positions: int = 512
    absolute: bool = False
    types: int = 0
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    activation: str = "gelu"
    eps: float = 1e-7
    terms: tuple[str, ...] = TERMS
    buckets: int = 256
    max_distance: int = 512
    shared: bool = True
    norm_distances: bool = True
    head: Head = "classification"
    labels: int = 2
    pooled: str = "gelu"
    dropout: float = 0.0
    scan: bool = True
    remat: str = "none"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        """Checks the heads and the terms."""
        hf_config.require_divisor(heads=self.heads, width=self.width)
        if tuple(term for term in TERMS if term in self.terms) != self.terms:
            raise ValueError(f"terms={self.terms}: give some of {TERMS}, in this order")

    @property
    def stacks(self) -> dict[str, int]:
        """Number of layers in every stack."""
        return {"layers": self.layers}

    @property
    def span(self) -> int:
        """Number of rows for distances to one side."""
        return self.buckets or self.max_distance

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **switches: Any) -> Config:
        """Reads a config.json; `switches` set head, dropout, scan, ...

        Without `head`, the name in `architectures` decides.
        """
        fields = hf_config.Fields(config, "deberta-v2")
        _refuse_convolution(fields)
        fields.expect(is_decoder=False, add_cross_attention=False, pruned_heads={})
        positions = fields.integer("max_position_embeddings", 512)
        width = fields.integer("hidden_size", 1536)
        heads = fields.integer("num_attention_heads", 24)
        fields.divides(num_attention_heads=heads, hidden_size=width)
        fields.expect(
            embedding_size=width,
            pooler_hidden_size=width,
            attention_head_size=width // heads,
        )
        distance = fields.integer("max_relative_positions", -1, least=-1)
        own = cls(
            vocabulary=fields.integer("vocab_size", 128100),
            positions=positions,
            absolute=fields.flag("position_biased_input", True),
            types=fields.integer("type_vocab_size", 0, least=0),
            width=width,
            layers=fields.layers("num_hidden_layers", 24),
            heads=heads,
            hidden=fields.integer("intermediate_size", 6144),
            activation=fields.activation("hidden_act", "gelu"),
            eps=fields.epsilon("layer_norm_eps", 1e-7),
            terms=_terms(fields),
            buckets=max(fields.integer("position_buckets", -1, least=-1), 0),
            max_distance=distance if distance > 0 else positions,
            shared=fields.flag("share_att_key", False),
            norm_distances="layer_norm" in _parts(fields, "norm_rel_ebd"),
            head=fields.head(switches, HEAD_NAMES),
            labels=switches.pop("labels", None) or fields.labels(),
            pooled=fields.activation("pooler_hidden_act", "gelu"),
            **switches,
        )
        fields.finish(
            *("cls_dropout", "conv_act", "legacy"),
            *("pooler_dropout", "tie_word_embeddings"),
        )
        return own

    def to_hf(self) -> dict[str, Any]:
        """Returns the fields of a config.json."""
        names = {head: name for name, head in HEAD_NAMES.items()}
        return {
            "architectures": [f"DebertaV2{names[self.head]}"],
            "model_type": "deberta-v2",
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
            "position_biased_input": self.absolute,
            "type_vocab_size": self.types,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.hidden,
            "hidden_act": self.activation,
            "layer_norm_eps": self.eps,
            "relative_attention": bool(self.terms),
            "pos_att_type": list(self.terms),
            "position_buckets": self.buckets or -1,
            "max_relative_positions": self.max_distance,
            "share_att_key": self.shared,
            "norm_rel_ebd": "layer_norm" if self.norm_distances else "none",
            "pooler_hidden_act": self.pooled,
            **hf_config.label_names(self.labels),
        }


HEAD_NAMES = {"ForSequenceClassification": "classification", "Model": "none"}
"""Suffixes of names in `architectures`, and the heads that they mean."""


def _refuse_convolution(fields: hf_config.Fields) -> None:
    size = fields.integer("conv_kernel_size", 0, least=0)
    if size:
        raise ValueError(
            f"config.json: conv_kernel_size={size}: the convolution beside the first "
            "layer of DeBERTa-v2's xlarge and xxlarge is not implemented; v3 has none"
        )


def _parts(fields: hf_config.Fields, name: str) -> set[str]:
    """Words between bars, such as "p2c|c2p", or a list of them."""
    rule = untrusted.TEXT | untrusted.listed(untrusted.TEXT)
    given = fields.take(name, rule, [])
    words = given.split("|") if isinstance(given, str) else given
    return {word.strip().lower() for word in words} - {"", "none"}


def _terms(fields: hf_config.Fields) -> tuple[str, ...]:
    """The terms of the scores that depend on distances."""
    given = _parts(fields, "pos_att_type")
    relative = fields.flag("relative_attention", False)
    if unknown := sorted(given - set(TERMS)):
        raise ValueError(
            f"config.json: pos_att_type has {unknown}, which are not implemented; "
            f"known are {', '.join(TERMS)}"
        )
    if relative != bool(given):
        raise ValueError(
            f"config.json: relative_attention={relative} and pos_att_type="
            f"{sorted(given)}: one asks for what the other leaves out"
        )
    return tuple(term for term in TERMS if term in given)


ALIASES = ((r"(embeddings|encoder)\.", r"deberta.\1."), *roberta_config.OLDER_NORMS)
"""Older names on disk, as `(regex of a prefix, replacement)`."""

HEADS = ("classifier_.*",)
"""Paths that a checkpoint may lack; `interop.hf.load` then draws them."""

IGNORED = (
    r".*\.position_ids",
    r"deberta\.embeddings\.position_embeddings\.weight",
    r"deberta\.embeddings\.(word|position)_embeddings\._weight",
    r"(lm|mask)_predictions\..*",
    r"cls\.predictions\..*",
    r"(pooler|classifier)\..*",
)
"""What this model may leave unread: buffers, what only pretraining reads (positions,
the discriminator's difference from the generator's embedding, both their heads), and
the head that was not chosen."""


def entries(config: Config) -> tuple[table.Entry, ...]:
    """Returns the table of parameters; a bare encoder's names have no family prefix."""
    whole = within(config)
    return table.bare(whole, "deberta") if config.head == "none" else whole


def within(config: Config) -> tuple[table.Entry, ...]:
    """Returns the table of parameters for an encoder inside a model with a head."""
    width, at, encoder = ("embed",), "deberta.embeddings", "deberta.encoder"
    linear = functools.partial(table.linear, bias=True)
    block = roberta_config.block_entries("query_proj", "key_proj", "value_proj")
    whole = [
        table.embedding(f"{at}.word_embeddings", "embed"),
        *table.layer_norm(f"{at}.LayerNorm", "norm_embed"),
    ]
    small = functools.partial(table.embedding, rows=None)
    if config.types:
        whole += [small(f"{at}.token_type_embeddings", "embed_types")]
    if config.absolute:
        whole += [small(f"{at}.position_embeddings", "embed_positions")]
    if config.terms:
        whole += [small(f"{encoder}.rel_embeddings", "embed_distances")]
        if config.norm_distances:
            whole += table.layer_norm(f"{encoder}.LayerNorm", "norm_distances")
    if not config.shared:
        heads, own = ("heads", "head_dim"), "attention.self"
        if "c2p" in config.terms:
            block += linear(f"{own}.pos_key_proj", "pos_k", width, heads)
        if "p2c" in config.terms:
            block += linear(f"{own}.pos_query_proj", "pos_q", width, heads)
    whole += table.inside(f"{encoder}.layer.{{}}", "layers{}", block)
    if config.head == "classification":
        whole += linear("pooler.dense", "classifier_dense", width, (None,))
        whole += linear("classifier", "classifier_out", width, (None,))
    return tuple(whole)


FURTHER = (within,)
"""Other tables that a checkpoint may follow."""
