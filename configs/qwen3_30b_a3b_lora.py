"""Qwen3-30B-A3B on chat, LoRA on attention and experts, on 16 chips of a v5e.

    lorax plan --config=qwen3_30b_a3b_lora
    lorax plan --config=qwen3_30b_a3b_lora --quantize=nf4

For 4 chips of a v5p set config.sharding.topology=v5p:2x2x1 and
config.sharding.expert=4.

Claimed: nothing; the shapes are those of its config.json. Never run at full size:
neither the checkpoint nor a TPU is available here. All that is known is what the
compiler says. Every expert has its own pair of factors; the router is frozen.

`:runlocal` shrinks the shapes, for a plan on `cpu:8`.
"""

import ml_collections

from configs import common, llama3_8b_lora, mixtral_8x7b_lora

PUBLISHED = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40_960,
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 151_936,
}
"""The fields of Qwen/Qwen3-30B-A3B's config.json."""

TINY = {"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 8}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config; `arg` may be `runlocal`."""
    args = common.parse_arg(arg, runlocal=False)
    config = mixtral_8x7b_lora.get_config().unlock()

    config.run.name = "qwen3_30b_a3b_lora"

    config.model.source = "Qwen/Qwen3-30B-A3B"
    config.model.published = ml_collections.ConfigDict(PUBLISHED)

    if args["runlocal"]:
        llama3_8b_lora.shrink(config)
        config.model.published.update(TINY)
    return config.lock()
