"""Shared by the configs of decoders with grouped heads and windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorax import attention as attentions
from lorax import untrusted
from lorax.models import hf_config, rope, table

ALIASES: tuple[tuple[str, str], ...] = ()
"""Older names on disk, as `(regex of a prefix, replacement)`."""

IGNORED = (r".*\.rotary_emb\.inv_freq",)
"""Buffers of older checkpoints, which hold nothing learnt."""


class Decoder:
    """Checks the fields of a config that attention needs.

    Attributes:
      layers: number of blocks.
      heads: number of query heads.
      kv_heads: number of key and value heads; it divides `heads`.
      windows: for every layer, how many tokens a token sees, itself included; 0: all.
        Empty: all, in every layer.
      attention: implementation of `attention.attend` for training: "plain", or "flash"
        for the one that suits the machine; decoding is always plain.
    """

    layers: int
    heads: int
    kv_heads: int
    windows: tuple[int, ...]
    attention: str

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} query heads cannot share {self.kv_heads} key heads"
            )
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(
                f"{len(self.windows)} windows for {self.layers} layers; give every "
                "layer one"
            )
        if self.attention not in attentions.IMPLEMENTATIONS:
            known = ", ".join(attentions.IMPLEMENTATIONS)
            raise ValueError(f"attention={self.attention!r}; choose one of {known}")

    @property
    def striped(self) -> bool:
        """Whether devices along "context" share rows; see `attention.stripe`."""
        return self.attention in attentions.STRIPED

    @property
    def stacks(self) -> dict[str, int]:
        """Number of layers in every stack."""
        return {"layers": self.layers}


def gated_mlp(bias: bool) -> tuple[table.Entry, ...]:
    """Returns the entries of gate, up and down, all with biases or all without."""
    width, hidden, linear = ("embed",), ("mlp",), table.linear
    return (
        *linear("mlp.gate_proj", "gate", width, hidden, bias=bias),
        *linear("mlp.up_proj", "up", width, hidden, bias=bias),
        *linear("mlp.down_proj", "down", hidden, width, bias=bias),
    )


def entries(
    config: Any,
    norms: Mapping[str, str],
    mlp: Sequence[table.Entry],
    *,
    o_bias: bool,
) -> tuple[table.Entry, ...]:
    """Returns the table of parameters of a decoder.

    Args:
      config: of the family.
      norms: of a layer, by their names on disk.
      mlp: entries of what follows attention, such as `gated_mlp`.
      o_bias: o has a bias.
    """
    block = layer_entries(config, norms, mlp, o_bias=o_bias)
    return around(config, table.inside("model.layers.{}", "layers{}", block))


def layer_entries(
    config: Any,
    norms: Mapping[str, str],
    mlp: Sequence[table.Entry],
    *,
    o_bias: bool,
) -> list[table.Entry]:
    """Returns the entries of one layer; arguments are those of `entries`."""
    heads, kv = ("heads", "head_dim"), ("kv_heads", "head_dim")
    width, linear, qkv = ("embed",), table.linear, {"bias": config.qkv_bias}
    block = [
        *linear("self_attn.q_proj", "q", width, heads, **qkv),
        *linear("self_attn.k_proj", "k", width, kv, **qkv),
        *linear("self_attn.v_proj", "v", width, kv, **qkv),
    ]
    if getattr(config, "fused", False):
        block = [*linear("self_attn.qkv_proj", "qkv", width, heads, **qkv)]
    block += [*linear("self_attn.o_proj", "o", heads, width, bias=o_bias), *mlp]
    if config.qk_norm:
        block += table.rms_norm("self_attn.q_norm", "norm_q")
        block += table.rms_norm("self_attn.k_norm", "norm_k")
    for key, name in norms.items():
        block += table.rms_norm(key, name)
    return block


def around(config: Any, layers: Sequence[table.Entry]) -> tuple[table.Entry, ...]:
    """Returns the entries of all layers, with the embedding, the last norm, the head.

    Args:
      config: of the family.
      layers: entries of every stack.
    """
    whole = [
        table.embedding("model.embed_tokens", "embed"),
        *layers,
        *table.rms_norm("model.norm", "norm_out"),
    ]
    if not config.tied:
        whole += table.linear("lm_head", "head", ("embed",), ("vocab",))
    return tuple(whole)


def rope_of(
    fields: hf_config.Fields, positions: int, kind: str, values: Mapping[str, Any]
) -> rope.Rope:
    """Returns the rotation of one kind of layer, which has a table of its own.

    Args:
      fields: of the config.json.
      positions: its `max_position_embeddings`.
      kind: of layer, the name of the table.
      values: of the table.
    """
    alone = hf_config.Fields({"rope_parameters": dict(values)}, fields.family)
    try:
        return rope.from_hf(alone, positions)
    except ValueError as error:
        raise ValueError(f"{error} (rope_parameters.{kind})") from None


def rope_tables(fields: hf_config.Fields) -> dict[str, dict[str, Any]]:
    """Takes `rope_parameters`, a table for each kind of layer; empty if not given."""
    given = fields.take("rope_parameters", untrusted.TABLE, {})
    if unknown := sorted(set(given) - set(hf_config.WINDOWED)):
        raise ValueError(
            f"config.json: rope_parameters has {unknown}; {fields.family} has one "
            f"table for each of {', '.join(hf_config.WINDOWED)}"
        )
    found = {}
    for kind in hf_config.WINDOWED:
        where = f"config.json: rope_parameters.{kind}"
        own = untrusted.check(where, given.get(kind) or {}, untrusted.TABLE)
        found[kind] = {key: v for key, v in own.items() if v is not None}
    return found
