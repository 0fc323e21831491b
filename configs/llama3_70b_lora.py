"""Llama 3 70B on chat, LoRA on every linear kernel, on 256 chips of a v5e.

    lorax plan --config=llama3_70b_lora
    lorax plan --config=llama3_70b_lora:v5p

Claimed: nothing; the shapes are those of its config.json. Never run at full size:
neither the checkpoint nor a TPU is available here. All that is known is what the
compiler says (docs/results/planner.md): 64 x 4,096 tokens fit.

`:v5p` takes 64 chips of a v5p (the cloud's v5p-128), whose memory has room for whole
products, so that no tensor parallelism is needed. `:runlocal` shrinks the shapes, for a
plan on `cpu:8`.
"""

import ml_collections

from configs import common, llama3_8b_lora


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config; `arg` may be `v5p` or `runlocal`."""
    args = common.parse_arg(arg, runlocal=False, v5p=False)
    config = llama3_8b_lora.get_config().unlock()

    config.run.name = "llama3_70b_lora"

    config.model.source = "meta-llama/Meta-Llama-3-70B"
    config.model.published.hidden_size = 8192
    config.model.published.intermediate_size = 28_672
    config.model.published.num_attention_heads = 64
    config.model.published.num_hidden_layers = 80

    config.data.batch_size = config.eval.batch_size = 64

    config.sharding.topology = "v5p:4x4x4" if args["v5p"] else "v5e:16x16"
    config.sharding.tensor = 1 if args["v5p"] else 4

    if args["runlocal"]:
        llama3_8b_lora.shrink(config)
    return config.lock()
