"""RoBERTa and BERT: bidirectional attention, blocks that normalise their sums.

The two differ in how tokens are numbered, in the number of token types, and in names
on disk. A block computes

  x = norm_attn(x + attention(x)),   x = norm_mlp(x + mlp(x)).

References:
  Devlin et al., BERT, arXiv:1810.04805. Liu et al., RoBERTa, arXiv:1907.11692.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from lorax import attention
from lorax.models import context, hf_config, layers, remat, table

Family = Literal["roberta", "bert"]
Head = Literal["classification", "mlm"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and switches; the defaults are RoBERTa-base.

    Attributes:
      family: "roberta": tokens are numbered by the real ones before them; "bert": by
        all. It also says how tensors are named on disk.
      vocabulary: number of tokens.
      positions: rows of the position embedding.
      offset: the row of the first token. RoBERTa: 1 + the padding token; BERT: 0.
      types: number of token types.
      width: of the residual stream.
      layers: blocks.
      heads: attention heads; they divide the width.
      hidden: width of the MLP.
      activation: of the MLP, by its Hugging Face name.
      eps: of the layer norms.
      head: "classification" of the first token, or "mlm", the masked tokens through
        the embedding.
      labels: classes of the classification.
      dropout: of embeddings, of what blocks add and in the classifier, when training;
        attention weights have none.
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
        """Layers of every stack."""
        return {"layers": self.layers}

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **switches: Any) -> Config:
        """Returns the sizes of a config.json; `switches` are head, dropout, scan, ...

        Without `head` the name in `architectures` decides.
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
        task = {"classification": "SequenceClassification", "mlm": "MaskedLM"}
        return {
            "architectures": [f"{name}For{task[self.head]}"],
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
    "Model": "classification",
}
"""Ends of names in `architectures`, and the heads that they mean."""


NAMES = ("input", "q", "k", "v", "attention", "o", "up", "down")
"""Of a layer's tensors, for `remat`."""


class EncoderSizes(layers.Sizes, Protocol):
    """What `Block` and `classify` read of a family's Config."""

    @property
    def heads(self) -> int:
        """Of attention."""

    @property
    def hidden(self) -> int:
        """Width of the MLP."""

    @property
    def activation(self) -> str:
        """Of the MLP, by its Hugging Face name."""

    @property
    def dropout(self) -> float:
        """Of what blocks add."""

    @property
    def labels(self) -> int:
        """Classes."""


class Block(nn.Module):
    """One layer; see `layers.run_layers` for its arguments."""

    config: EncoderSizes
    deterministic: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, own: Any, shared: Any) -> tuple[jax.Array, Any]:
        """Maps the residual stream to the next."""
        config = self.config
        linear = functools.partial(layers.projection, config=config, use_bias=True)
        x = remat.named(x, "input")
        mixed = remat.named(self._attend(x, shared), "attention")
        mixed = linear(config.width, "o", axis=(-2, -1))(mixed)
        x = layers.layer_norm("norm_attn", config)(x + self._drop(mixed))
        h = hf_config.ACTIVATIONS[config.activation](linear(config.hidden, "up")(x))
        h = linear(config.width, "down")(h)
        return layers.layer_norm("norm_mlp", config)(x + self._drop(h)), None

    def _attend(self, x: jax.Array, shared: Any) -> jax.Array:
        """What the heads return, `[batch, time, heads, head_dim]`."""
        q, k, v = (self._heads(name)(x) for name in ("q", "k", "v"))
        return attention.attend(q, k, v, mask=shared["mask"])

    def _heads(self, name: str) -> nn.Module:
        config = self.config
        size = config.heads, config.width // config.heads
        return layers.projection(size, name, config, use_bias=True)

    def _drop(self, x: jax.Array) -> jax.Array:
        return nn.Dropout(self.config.dropout, deterministic=self.deterministic)(x)


class Model(nn.Module):
    """Tokens to logits, of the sequence's class or of every token."""

    config: Config

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        types: jax.Array | None = None,
        real: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Reads tokens.

        Args:
          tokens: int `[batch, time]`; the first real one is <s> or [CLS].
          positions: int `[batch, time]`, from 0; None counts as `Config.family` says.
          types: int `[batch, time]`, of the tokens; None: all are 0.
          real: bool `[batch, time]`, False for padding; None: all are real.
          deterministic: no dropout.

        Returns:
          Float32 logits, `[batch, labels]` or `[batch, time, vocabulary]`.
        """
        config = self.config
        drop = nn.Dropout(config.dropout, deterministic=deterministic)
        embed = layers.embedding(config.vocabulary, "embed", config)
        x = embed(tokens) + self._places(tokens, positions, real)
        types = jnp.zeros_like(tokens) if types is None else types
        x = x + layers.embedding(config.types, "embed_types", config)(types)
        x, _ = layers.run_layers(
            Block,
            config,
            drop(layers.layer_norm("norm_embed", config)(x)),
            None,
            {"mask": context.padding_mask(tokens, real)},
            length=config.layers,
            names=NAMES,
            options=(deterministic,),
        )
        if config.head == "mlm":
            return self._predictions(x, embed)
        return classify(x, real, config, drop, jnp.tanh)

    def _places(
        self, tokens: jax.Array, positions: jax.Array | None, real: jax.Array | None
    ) -> jax.Array:
        """The embeddings of positions, `[batch, time, width]`."""
        config = self.config
        if positions is None:
            room, time = config.positions - config.offset, tokens.shape[1]
            if time > room:
                raise ValueError(f"{time} tokens, but there are {room} positions")
            counted = real if config.family == "roberta" else None
            positions = context.positions_of(tokens, counted, None)
        embed = layers.embedding(config.positions, "embed_positions", config)
        return embed(positions + config.offset)

    def _predictions(self, x: jax.Array, embed: nn.Embed) -> jax.Array:
        """The masked language model's logits."""
        config = self.config
        # RoBERTa's own code fixes this activation, BERT's takes that of the MLP
        activation = "gelu" if config.family == "roberta" else config.activation
        h = hf_config.ACTIVATIONS[activation](
            self._linear(config.width, "mlm_dense")(x)
        )
        logits = embed.attend(layers.layer_norm("mlm_norm", config)(h))
        zeros = nn.initializers.zeros
        bias = self.param("mlm_bias", zeros, (config.vocabulary,), config.param_dtype)
        return logits.astype(jnp.float32) + bias.astype(jnp.float32)

    def _linear(self, features: int, name: str) -> nn.Module:
        return layers.projection(features, name, self.config, use_bias=True)


def classify(
    x: jax.Array,
    real: jax.Array | None,
    config: EncoderSizes,
    drop: nn.Module,
    activation: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Logits `[batch, labels]` by the first real token, inside a compact method."""
    linear = functools.partial(layers.projection, config=config, use_bias=True)
    if real is None:
        first = x[:, 0]
    else:
        at = jnp.argmax(real, axis=1)
        first = jnp.take_along_axis(x, at[:, None, None], axis=1)[:, 0]
    h = activation(linear(config.width, "classifier_dense")(drop(first)))
    return linear(config.labels, "classifier_out")(drop(h)).astype(jnp.float32)


OLDER_NORMS = ((r"(.*)\.gamma$", r"\1.weight"), (r"(.*)\.beta$", r"\1.bias"))
ALIASES = ((r"(embeddings|encoder|pooler)\.", r"roberta.\1."), *OLDER_NORMS)
"""Older names on disk, as `(regex of a prefix, replacement)`."""

HEADS = ("classifier_.*",)
"""Paths of what a checkpoint may lack and `interop.hf.load` then draws."""

IGNORED = (
    r".*\.position_ids",
    r"roberta\.pooler\..*",
    r"lm_head\..*",
    r"classifier\..*",
)
"""What this model may leave on disk: buffers, copies of the embedding, a pooler that
nothing reads, and the head that was not chosen."""


def entries(config: Config) -> tuple[table.Entry, ...]:
    """Returns the table of parameters."""
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


def block_entries(
    query: str = "query", key: str = "key", value: str = "value"
) -> list[table.Entry]:
    """Returns the table of one layer, whose projections have these names on disk."""
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
