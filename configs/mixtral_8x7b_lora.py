"""Mixtral 8x7B on chat, LoRA on attention and experts, on 16 chips of a v5e.

    lorax plan --config=mixtral_8x7b_lora
    lorax plan --config=mixtral_8x7b_lora --quantize=nf4

For 4 chips of a v5p set config.sharding.topology=v5p:2x2x1 and
config.sharding.expert=4.

Claimed: nothing; the shapes are those of its config.json. Never run at full size:
neither the checkpoint nor a TPU is available here. On the v5p the plan compiles with
LIBTPU_INIT_ARGS=--xla_tpu_scoped_vmem_limit_kib=32768. The v5e's VMEM is too small for
its `jax.lax.ragged_dot`: there it compiles with config.model.dispatch=dense. Every
expert has its own pair of factors; the router is frozen.

`:runlocal` shrinks the shapes, for a plan on `cpu:8`.
"""

import ml_collections

from configs import common, llama3_8b_lora

PUBLISHED = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "max_position_embeddings": 32_768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "router_aux_loss_coef": 0.02,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32_000,
}
"""The fields of mistralai/Mixtral-8x7B-v0.1's config.json."""

PATTERNS = (r".*/(q|k|v|o)/kernel", r".*/experts/(gate_up|down)/kernel")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config; `arg` may be `runlocal`."""
    args = common.parse_arg(arg, runlocal=False)
    config = llama3_8b_lora.get_config().unlock()

    config.run.name = "mixtral_8x7b_lora"

    config.model.source = "mistralai/Mixtral-8x7B-v0.1"
    config.model.published = ml_collections.ConfigDict(PUBLISHED)
    config.model.attention = "flash"

    config.adapter.patterns = PATTERNS

    config.data.lengths = (2048,)
    config.data.batch_size = config.eval.batch_size = 16

    config.sharding.topology = "v5e:4x4"
    config.sharding.expert = 8

    if args["runlocal"]:
        llama3_8b_lora.shrink(config)
    return config.lock()
