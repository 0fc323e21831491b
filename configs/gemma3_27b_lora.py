"""Gemma 3 27B on chat, LoRA on every linear kernel, on 4 chips of a v5p.

    lorax plan --config=gemma3_27b_lora
    lorax plan --config=gemma3_27b_lora --quantize=nf4

Claimed: nothing; the shapes are those of the text model in its config.json. Never run
at full size: neither the checkpoint nor a TPU is available here. All that is known is
what the compiler says.

`:runlocal` shrinks the shapes, for a plan on `cpu:8`.
"""

import ml_collections

from configs import common, llama3_8b_lora

PUBLISHED = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "final_logit_softcapping": None,
    "head_dim": 128,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 5376,
    "intermediate_size": 21_504,
    "max_position_embeddings": 131_072,
    "model_type": "gemma3_text",
    "num_attention_heads": 32,
    "num_hidden_layers": 62,
    "num_key_value_heads": 16,
    "query_pre_attn_scalar": 168,
    "rms_norm_eps": 1e-6,
    "rope_local_base_freq": 10_000.0,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "rope_theta": 1_000_000.0,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 262_208,
}
"""The fields of `text_config` in google/gemma-3-27b-pt's config.json."""

TINY = {"head_dim": 16, "num_key_value_heads": 8, "sliding_window": 16}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config; `arg` may be `runlocal`."""
    args = common.parse_arg(arg, runlocal=False)
    config = llama3_8b_lora.get_config().unlock()

    config.run.name = "gemma3_27b_lora"

    config.model.source = "google/gemma-3-27b-pt"
    config.model.published = ml_collections.ConfigDict(PUBLISHED)
    config.model.attention = "flash"

    config.data.lengths = (2048,)
    config.data.batch_size = config.eval.batch_size = 8

    config.sharding.topology = "v5p:2x2x1"

    if args["runlocal"]:
        llama3_8b_lora.shrink(config)
        config.model.published.update(TINY)
    return config.lock()
