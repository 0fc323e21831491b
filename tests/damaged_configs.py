"""A config.json of every family for the fuzz, and what changes may legally mean."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np

from lorax.interop import hf
from lorax.models import gemma, gemma4, gpt2, llama, roberta, t5
from lorax.models.rope import Rope
from tests.damaged import Case, Source

LARGEST = 2**31 - 1
YARN = Rope(1e6, "yarn", 4.0, 32, 2.0, 16.0, 1.5)
LLAMA3 = Rope(5e5, "llama3", 8.0, 32, 2.0, 4.0)
LONGROPE = Rope(1e4, "longrope", 4.0, 16, short=(1.0, 1.5, 2.0), long=(2.0, 3.0, 4.0))
SIZES = dict(positions=64, width=16, layers=2, heads=4, kv_heads=2, head_dim=6)
CONFIGS: dict[str, Any] = {
    "gemma": gemma.Config(
        31,
        **SIZES,
        windows=(0, 0),
        hidden=24,
        query_scale=6,
        soft_cap=None,
        logit_cap=None,
        post_norms=False,
        model_type="gemma",
    ),
    "gemma2": gemma.Config(31, **SIZES, windows=(8, 0), hidden=24, query_scale=5),
    "gemma3_text": gemma.Config(
        31,
        **SIZES,
        hidden=24,
        windows=(8, 0),
        rope=dataclasses.replace(LLAMA3),
        qk_norm=True,
        soft_cap=None,
        logit_cap=7.0,
        model_type="gemma3_text",
    ),
    "gemma4_text": gemma4.Config(
        31,
        **SIZES,
        hidden=24,
        far_kv_heads=2,
        far_head_dim=8,
        windows=(8, 0),
        extra=2,
        extra_vocabulary=9,
        logit_cap=7.0,
    ),
    "gpt2": gpt2.Config(31, 16, 16, 2, 4, 40, "relu", 1e-4),
    "llama": llama.Config(31, **SIZES, hidden=24, activation="gelu", rope=LLAMA3),
    "mistral": llama.Config(
        31, **SIZES, eps=1e-4, windows=(8, 8), model_type="mistral"
    ),
    "ministral": llama.Config(31, **SIZES, windows=(8, 0), model_type="ministral"),
    "olmo2": llama.Config(
        31,
        **SIZES,
        qk_norm=True,
        all_heads=True,
        post_norms=True,
        model_type="olmo2",
    ),
    "phi3": llama.Config(
        31, **SIZES, windows=(8, 8), fused=True, rope=LONGROPE, model_type="phi3"
    ),
    "smollm3": llama.Config(
        31,
        **SIZES,
        turned=(True, False),
        windows=(0, 8),
        tied=True,
        model_type="smollm3",
    ),
    "qwen2": llama.Config(
        31, **SIZES, qkv_bias=True, windows=(0, 9), model_type="qwen2", tied=True
    ),
    "qwen3": llama.Config(31, **SIZES, qk_norm=True, rope=YARN, model_type="qwen3"),
    "roberta": roberta.Config("roberta", 31, 16, 2, 1, 16, 2, 4, 24, "relu", labels=3),
    "bert": roberta.Config("bert", 31, 16, 0, 2, 16, 2, 4, 24, "relu", labels=3),
    "t5": t5.Config(31, 16, 2, 1, 4, 6, 24, "silu", True, 8, 50, 1e-4, False, 3),
}
GENERIC = {
    "torch_dtype": "float32",
    "transformers_version": "4.57.0",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.02,
    "use_cache": True,
    "attention_dropout": 0.0,
    "task_specific_params": {"x": {"max_length": 9}},
    "temperature": 1.0,
    "use_something_new": False,
}
"""What real files hold besides the fields that a family reads."""

MEANS = {
    "gemma": {"max_position_embeddings absent": {"positions": 8192}},
    "gemma2": {
        "max_position_embeddings absent": {"positions": 8192},
        "query_pre_attn_scalar absent": {"query_scale": 256},
        "attn_logit_softcapping null": {"soft_cap": None},
        "attn_logit_softcapping huge": {"soft_cap": LARGEST},
        "final_logit_softcapping null": {"logit_cap": None},
        "final_logit_softcapping huge": {"logit_cap": LARGEST},
        "sliding_window absent": {"windows": (4096, 0)},
    },
    "gemma3_text": {
        "max_position_embeddings absent": {"positions": 131_072},
        "query_pre_attn_scalar absent": {"query_scale": 256},
        "final_logit_softcapping absent": {"logit_cap": None},
        "final_logit_softcapping huge": {"logit_cap": LARGEST},
        "sliding_window absent": {"windows": (4096, 0)},
        "layer_types absent": {"windows": (8, 8)},
        "factor huge": {"factor": float(LARGEST)},
        "high_freq_factor huge": {"high": LARGEST},
        "original_max_position_embeddings huge": {"original": LARGEST},
    },
    "gemma4_text": {
        "max_position_embeddings absent": {"positions": 131_072},
        "final_logit_softcapping absent": {"logit_cap": None},
        "final_logit_softcapping null": {"logit_cap": None},
        "final_logit_softcapping huge": {"logit_cap": LARGEST},
        "sliding_window absent": {"windows": (512, 0)},
        "use_double_wide_mlp": "wide",
    },
    "gpt2": {
        "activation_function absent": {"activation": "gelu_new"},
        "layer_norm_epsilon absent": {"eps": 1e-5},
        "scale_attn_weights": "scale",
        "scale_attn_by_inverse_layer_idx": "scale_by_layer",
    },
    "llama": {
        "max_position_embeddings absent": {"positions": 4096},
        "max_position_embeddings huge": {"positions": LARGEST},
        "hidden_act absent": {"activation": "silu"},
        "rms_norm_eps absent": {"eps": 1e-6},
        "tie_word_embeddings": "tied",
        "original_max_position_embeddings huge": {"original": LARGEST},
        "factor huge": {"factor": float(LARGEST)},
        "high_freq_factor huge": {"high": LARGEST},
        "beta_fast huge": {"high": LARGEST},
        "attention_factor huge": {"attention": LARGEST},
        "original_max_position_embeddings absent": {"original": 64},
        "beta_slow absent": {"low": 1.0},
        "beta_fast absent": {"high": 32.0},
        "attention_factor absent": {"attention": None},
        "truncate": "truncate",
        "sliding_window absent": {"windows": ()},
    },
    "ministral": {"layer_types absent": {"windows": (8, 8)}},
    "olmo2": {"rms_norm_eps absent": {"eps": 1e-5}},
    "phi3": {"rms_norm_eps absent": {"eps": 1e-5}},
    "smollm3": {"no_rope_layers absent": {"turned": ()}},
    "roberta": {
        "hidden_act absent": {"activation": "gelu"},
        "layer_norm_eps absent": {"eps": 1e-12},
    },
    "t5": {
        "relative_attention_max_distance absent": {"max_distance": 128},
        "layer_norm_epsilon absent": {"eps": 1e-6},
        "decoder_start_token_id absent": {"start": 0},
        "scale_decoder_outputs": "tied",
    },
}
"""Under `<field> absent | huge`, what the sizes become; under a field, what a switch
sets. Defaults are those of transformers' config classes."""


def config_source(family: str, folder: pathlib.Path) -> Source:
    """A tiny model of the family."""
    config = CONFIGS[family]
    draw = np.random.default_rng(0)
    module = hf.family_of(config.to_hf(), "")
    shapes = hf.abstract(module.Model(config))
    params = jax.tree.map(
        lambda s: draw.standard_normal(s.shape).astype(s.dtype), shapes
    )
    hf.save(folder, config, params)
    told = GENERIC | json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told))
    legal = functools.partial(_config_means, config, params)
    return Source(folder, "config.json", _model, legal)


def _model(folder: Any) -> Any:
    model, params = hf.load(folder)
    return dataclasses.asdict(model.config), params


def _config_means(config: Any, params: Any, case: Case) -> Any:
    told = _group(config)
    field, value = case.key[-1], case.value
    absent = case.kind in ("null", "missing")
    kind = case.kind
    if absent and f"{field} {kind}" not in told:
        kind = "absent"
    rule = told.get(f"{field} {kind}")
    if case.kind == "huge" and value != LARGEST:
        rule = None
    if case.kind == "bool":
        rule = {told[field]: value} if field in told else None
    if field == "sliding_window" and case.kind == "huge" and value == LARGEST:
        rule = {"windows": tuple(w and LARGEST for w in config.windows)}
    if case.kind == "huge" and case.key[-2:-1] and field == "rope_theta":
        kind = {"full_attention": "rope", "sliding_attention": "local_rope"}
        own = kind.get(str(case.key[-2]))
        if own and isinstance(config, gemma4.Config):
            rule = {own: dataclasses.replace(getattr(config, own), base=float(value))}
    if rule is None:
        return None
    if hasattr(config, "rope") and next(iter(rule)) in vars(config.rope):
        rule = {"rope": dataclasses.replace(config.rope, **rule)}
    meant = dataclasses.replace(config, **rule)
    head = {"head"} if getattr(meant, "tied", False) else set()
    kept = {name: leaf for name, leaf in params.items() if name not in head}
    return dataclasses.asdict(meant), kept


def _group(config: Any) -> dict[str, Any]:
    own = MEANS.get(config.to_hf()["model_type"])
    if isinstance(config, llama.Config):
        return MEANS["llama"] | (own or {})
    return own or MEANS["roberta"]
