"""RoBERTa-base on a GLUE task with LoRA+: b's learning rate is 16 times a's.

    lorax run --config=roberta_glue_lora_plus \
        --config.data.root=/path/to/glue_data

Claimed: 1 to 2 % better and up to twice as fast as LoRA on its tasks (Hayou et al.,
arXiv:2402.12354, abstract). Never run at full size: neither the checkpoint nor GLUE is
available here. `:runlocal` is a smoke test, not a result.
"""

import ml_collections

from configs import common, roberta_glue_lora


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config; `arg` may be `runlocal`."""
    config = roberta_glue_lora.get_config(arg).unlock()
    config.run.name = "roberta_glue_lora_plus"
    config.optimizer.name = "lora_plus"
    config.optimizer.options = (("ratio", 16.0),)
    config.optimizer.learning_rate.lora = 1.25e-4  # of a; a quarter of LoRA's
    if common.parse_arg(arg, runlocal=False)["runlocal"]:
        config.optimizer.learning_rate.lora = 1.25e-3
    return config.lock()
