"""Sizes and switches of mixtures of experts, and their parameters; see `mixture`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lorax import untrusted
from lorax.models import decoder_config, experts, hf_config, llama_config, table

ARCHITECTURES = {
    "gpt_oss": "GptOssForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}

LIKE = {"gpt_oss": "llama", "mixtral": "mistral", "qwen3_moe": "qwen3"}
"""Models of the Llama family whose layers are the same but for the MLP."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt_oss": {
        "attention_bias": True,
        "vocab_size": 201_088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150_000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "sliding_window": 128,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    },
    "mixtral": {
        "intermediate_size": 14_336,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 1e6},
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "sliding_window": 4096,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
}
"""What transformers assumes for fields that a config.json leaves out."""


@dataclasses.dataclass(frozen=True)
class Config(llama_config.Config):
    """Sizes and switches: those of `llama.Config`, and these.

    Attributes:
      hidden: width of an expert.
      experts: number of experts.
      chosen: number of experts that a token visits.
      renormalised: the weights of a token's experts sum to one.
      sinks: every head has one more score than there are keys, without a value.
      expert_bias: the router, and gate, up and down of every expert, have biases.
      swiglu: alpha and limit of `g sigmoid(alpha g) (up + 1)`, with the gate g clipped
        from above and up on both sides by the limit; None: by `activation`.
      balance: weight of the balance loss in training, from the model's config.json.
      dispatch: how tokens reach experts, see `lorax.models.experts`.
    """

    hidden: int = 14_336
    experts: int = 8
    chosen: int = 2
    renormalised: bool = True
    sinks: bool = False
    expert_bias: bool = False
    swiglu: tuple[float, float] | None = None
    balance: float = 0.001
    model_type: str = "mixtral"
    dispatch: str = "ragged"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.chosen <= self.experts:
            raise ValueError(
                f"each token visits {self.chosen} of {self.experts} experts; give at "
                "least one, and no more than there are"
            )
        if self.dispatch not in experts.DISPATCHES:
            known = ", ".join(experts.DISPATCHES)
            raise ValueError(f"dispatch={self.dispatch!r}; choose one of {known}")
        if self.sinks and self.attention != "plain":
            raise ValueError(
                f"attention={self.attention!r}: sinks are implemented only for 'plain'"
            )

    def gated(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        """Returns what an expert's `down` reads."""
        if self.swiglu is None:
            return hf_config.ACTIVATIONS[self.activation](gate) * up
        alpha, limit = self.swiglu
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **switches: Any) -> Config:
        """Reads a config.json; `switches` set scan, dispatch, dtype, ..."""
        kind = config.get("model_type", "mixtral")
        if not isinstance(kind, str) or kind not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(f"config.json: model_type={kind!r} is not one of {known}")
        fields = hf_config.Fields(_filled(config, kind), kind)
        own = _experts(fields, kind)
        if "dispatch" in switches:
            own["dispatch"] = switches.pop("dispatch")
        rest = fields.left | {"model_type": LIKE[kind]}
        plain = llama_config.Config.from_hf(rest, **switches)
        return cls(**{**vars(plain), **own, "model_type": kind})

    def to_hf(self) -> dict[str, Any]:
        """Returns the fields of a config.json that transformers 4 and 5 read."""
        names = [field.name for field in dataclasses.fields(llama_config.Config)]
        same = {name: getattr(self, name) for name in names}
        same["model_type"] = LIKE[self.model_type]
        written = llama_config.Config(**same).to_hf()
        written |= {
            "architectures": [ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "num_experts_per_tok": self.chosen,
            "router_aux_loss_coef": self.balance,
        }
        if self.swiglu is not None:
            del written["mlp_bias"]
            alpha, limit = self.swiglu
            return written | {
                "num_local_experts": self.experts,
                "sliding_window": max(self.windows) or None,
                "layer_types": hf_config.layer_types(self.windows),
                "swiglu_alpha": alpha,
                "swiglu_limit": limit,
            }
        if self.model_type == "mixtral":
            return written | {"num_local_experts": self.experts}
        del written["intermediate_size"], written["layer_types"]
        return written | {
            "num_experts": self.experts,
            "moe_intermediate_size": self.hidden,
            "norm_topk_prob": self.renormalised,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }


COUNTS = {"num_experts", "num_local_experts"}
"""Fields that say how many experts a layer has."""


def _filled(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """A config.json with defaults, in the Llama family's names."""
    told = {name: value for name, value in config.items() if value is not None}
    usual = dict(DEFAULTS[kind])
    if told.keys() & {"rope_theta", "rope_scaling", "rope_parameters"}:
        usual.pop("rope_parameters", None)
    if told.keys() & COUNTS:
        usual = {name: value for name, value in usual.items() if name not in COUNTS}
    if kind == "qwen3_moe":  # if there is a window, every layer has it
        told["max_window_layers"] = 0
    return {**usual, **told}


def _experts(fields: hf_config.Fields, kind: str) -> dict[str, Any]:
    """What a config.json says about experts."""
    told = {name: fields.integer(name, None) for name in sorted(COUNTS)}
    counts = {count for count in told.values() if count is not None}
    if len(counts) != 1:
        raise ValueError(f"config.json: the number of experts is given twice: {told}")
    own = {
        "experts": counts.pop(),
        "chosen": fields.integer("num_experts_per_tok", None),
        "balance": fields.take("router_aux_loss_coef", untrusted.number(0), 0.001),
    }
    fields.flag("output_router_logits", False)  # only one more output
    if kind == "gpt_oss":
        return own | _gpt_oss(fields)
    if kind == "mixtral":
        fields.expect(router_jitter_noise=0.0)
        return own | {"hidden": fields.integer("intermediate_size", None)}
    fields.expect(decoder_sparse_step=1, mlp_only_layers=[])
    fields.integer("intermediate_size", None)  # of layers without experts
    return own | {
        "hidden": fields.integer("moe_intermediate_size", None),
        "renormalised": fields.flag("norm_topk_prob", False),
    }


def _gpt_oss(fields: hf_config.Fields) -> dict[str, Any]:
    """What a config.json of GPT-OSS adds to the others'."""
    depth = fields.layers("num_hidden_layers", 36)
    fields.left["num_hidden_layers"] = depth
    size, slides = fields.integer("sliding_window", 128), fields.windowed(depth)
    if slides is None:
        slides = [bool((layer + 1) % 2) for layer in range(depth)]
    positive = untrusted.number(above=0)
    alpha, limit = (
        float(fields.take(f"swiglu_{name}", positive, None))
        for name in ("alpha", "limit")
    )
    for name in ("experts_per_token", "initial_context_length"):
        fields.integer(name, None)  # other fields say the same
    return {
        "hidden": fields.integer("intermediate_size", None),
        "windows": tuple(size if own else 0 for own in slides),
        "sinks": True,
        "expert_bias": True,
        "swiglu": (alpha, limit),
    }


GATE_UP = "experts/gate_up/kernel", ("experts", "embed", None, "mlp")
DOWN = "experts/down/kernel", ("experts", "mlp", "embed")
"""Paths and logical axes of the kernels of all experts of a layer."""


def entries(config: Config) -> tuple[table.Entry, ...]:
    """Returns the table of parameters, with separate experts except in GPT-OSS."""
    if config.model_type == "gpt_oss":
        return fused(config)
    mixtral = config.model_type == "mixtral"
    root = "block_sparse_moe" if mixtral else "mlp"
    gate, up = ("w1", "w3") if mixtral else ("gate_proj", "up_proj")
    down = "w2" if mixtral else "down_proj"
    found = []
    for i in range(config.experts):
        key = f"{root}.experts.{i}.{{}}.weight"
        parts = {gate: (i, None, 0), up: (i, None, 1)}
        found += [_apart(key, name, GATE_UP, part) for name, part in parts.items()]
        found.append(_apart(key, down, DOWN, (i,)))
    return _entries(config, root, found)


def fused(config: Config) -> tuple[table.Entry, ...]:
    """Returns the table of transformers' own modules, where experts share tensors."""
    key = "mlp.experts"
    if config.model_type == "gpt_oss":
        of = "experts/gate_up/bias", ("experts", None, "mlp")
        found = [
            table.Entry(f"{key}.gate_up_proj", *GATE_UP, order=(0, 1, (3, 2))),
            table.Entry(f"{key}.gate_up_proj_bias", *of, inputs=0, order=(0, (2, 1))),
            table.Entry(f"{key}.down_proj", *DOWN, order=(0, 1, 2)),
            table.Entry(
                f"{key}.down_proj_bias",
                "experts/down/bias",
                ("experts", None),
                inputs=0,
                order=(0, 1),
            ),
            table.Entry("self_attn.sinks", "sinks", ("heads",), inputs=0),
        ]
        return _entries(config, "mlp", found)
    gate_up = table.Entry(f"{key}.gate_up_proj", *GATE_UP, order=(0, (2, 3), 1))
    down = table.Entry(f"{key}.down_proj", *DOWN, order=(0, 2, 1))
    return _entries(config, "mlp", [gate_up, down])


Leaf = tuple[str, tuple[str | None, ...]]


def _apart(
    key: str, name: str, leaf: Leaf, part: tuple[int | None, ...]
) -> table.Entry:
    return table.Entry(key.format(name), *leaf, True, part=part)


def _entries(
    config: Config, root: str, found: Sequence[table.Entry]
) -> tuple[table.Entry, ...]:
    name = "router" if config.model_type == "gpt_oss" else "gate"
    router = table.linear(
        f"{root}.{name}", "router", ("embed",), (None,), bias=config.expert_bias
    )
    return decoder_config.entries(
        config, llama_config.NORMS, [*router, *found], o_bias=config.o_bias
    )
