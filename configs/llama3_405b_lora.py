"""Llama 3.1 405B on chat, LoRA on every linear kernel, on 16 chips of a v5p.

    lorax plan --config=llama3_405b_lora

Claimed: nothing; the shapes are those of its config.json. Never run at full size:
neither the checkpoint nor a TPU is available here. All that is known is what the
compiler says (docs/results/planner.md). In bfloat16 the weights alone take 755 GiB, so
eight chips of 95.73 GiB are too few; the inputs of the layers are offloaded to host
memory.

`:runlocal` shrinks the shapes, for a plan on `cpu:8`.
"""

import ml_collections

from configs import common, llama3_8b_lora


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config; `arg` may be `runlocal`."""
    args = common.parse_arg(arg, runlocal=False)
    config = llama3_8b_lora.get_config().unlock()

    config.run.name = "llama3_405b_lora"

    config.model.source = "meta-llama/Llama-3.1-405B"
    config.model.published.hidden_size = 16_384
    config.model.published.intermediate_size = 53_248
    config.model.published.num_attention_heads = 128
    config.model.published.num_hidden_layers = 126
    config.model.attention = "flash"
    config.model.remat = "offload=input"

    config.data.batch_size = config.eval.batch_size = 16

    config.sharding.topology = "v5p:2x2x4"

    if args["runlocal"]:
        llama3_8b_lora.shrink(config)
    return config.lock()
