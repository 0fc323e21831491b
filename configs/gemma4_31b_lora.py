"""Gemma 4 31B on chat, LoRA on every linear kernel, on 4 chips of a v5p.

    lorax plan --config=gemma4_31b_lora
    lorax plan --config=gemma4_31b_lora --quantize=nf4

Claimed: nothing. In this setting, LoRA on v5p:2x2x1 (8 cores), tunix and qwix are
reported to reach 763 tokens a second (arXiv 2605.25645). Never run at full size:
neither the checkpoint nor a TPU is available here. All that is known is what the
compiler says; the shapes were not compared with the checkpoint's own config.json.

`:runlocal` shrinks the shapes, for a plan on `cpu:8`.
"""

import ml_collections

from configs import common, gemma3_27b_lora, llama3_8b_lora

PUBLISHED = {
    "architectures": ["Gemma4ForCausalLM"],
    "attention_bias": False,
    "attention_k_eq_v": True,
    "final_logit_softcapping": 30.0,
    "global_head_dim": 512,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 5376,
    "hidden_size_per_layer_input": 0,
    "intermediate_size": 21_504,
    "max_position_embeddings": 262_144,
    "model_type": "gemma4_text",
    "num_attention_heads": 32,
    "num_global_key_value_heads": 4,
    "num_hidden_layers": 60,
    "num_key_value_heads": 16,
    "num_kv_shared_layers": 0,
    "rms_norm_eps": 1e-6,
    "sliding_window": 1024,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 262_144,
}
"""The fields of the text model, entered by hand: 30.7 billion parameters."""

TINY = {
    "global_head_dim": 32,
    "head_dim": 16,
    "num_global_key_value_heads": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 8,
    "sliding_window": 16,
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config; `arg` may be `runlocal`."""
    args = common.parse_arg(arg, runlocal=False)
    config = gemma3_27b_lora.get_config().unlock()

    config.run.name = "gemma4_31b_lora"

    config.model.source = "google/gemma-4-31B"
    config.model.published = ml_collections.ConfigDict(PUBLISHED)

    if args["runlocal"]:
        llama3_8b_lora.shrink(config)
        config.model.published.update(TINY)
    return config.lock()
