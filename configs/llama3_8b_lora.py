"""Llama 3 8B on chat, LoRA on every linear kernel, on 16 chips of a v5e.

    lorax plan --config=llama3_8b_lora

Claimed: nothing; the shapes are those of its config.json. Never run at full size:
neither the checkpoint nor a TPU is available here. All that is known is what the
compiler says (docs/results/planner.md): 16 x 4,096 tokens fit, with frozen kernels in
bfloat16, adapters and moments in float32, and each layer recomputed.

`:runlocal` shrinks the shapes, for a plan on `cpu:8`.
"""

import ml_collections

from configs import common

PUBLISHED = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128_256,
}
"""The fields of meta-llama/Meta-Llama-3-8B's config.json."""

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "vocab_size": 256,
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config; `arg` may be `runlocal`."""
    args = common.parse_arg(arg, runlocal=False)
    config = common.checkpoint_run()

    config.run.name = "llama3_8b_lora"

    config.model.source = "meta-llama/Meta-Llama-3-8B"
    config.model.published = ml_collections.ConfigDict(PUBLISHED)
    config.model.dtype = "bfloat16"
    config.model.remat = "full"

    config.adapter.rank = 16
    config.adapter.alpha = 32.0

    config.optimizer.learning_rate.lora = 2e-4

    config.data.task = "instructions"
    config.data.train = "gsm8k/train.jsonl.gz"  # below the folder of data sets
    config.data.valid = "gsm8k/test.jsonl.gz"
    config.data.template = "Question: {prompt}\nAnswer: "
    config.data.lengths = (4096,)
    config.data.batch_size = config.eval.batch_size = 16

    config.sharding.topology = "v5e:4x4"
    config.sharding.fsdp = -1  # all chips share each leaf

    if args["runlocal"]:
        shrink(config)
    return config.lock()


def shrink(config: ml_collections.ConfigDict) -> None:
    """Shrinks the shapes, and takes eight CPU devices."""
    config.model.published.update(TINY)
    config.adapter.rank = 4
    config.data.lengths = (32,)
    config.data.batch_size = config.eval.batch_size = 8
    config.sharding.topology = "cpu:8"
