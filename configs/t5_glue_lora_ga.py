"""T5-base on a GLUE task, text to text, with LoRA-GA.

    lorax run --config=t5_glue_lora_ga \
        --config.data.root=/path/to/glue_data

Claimed: SST-2 accuracy 94.11, five tasks on average 87.77, after one epoch (Wang et
al., arXiv:2407.05000, table 1, row "LoRA-GA"; full fine-tuning 94.75 and 87.91). Never
run at full size: neither the checkpoint nor GLUE is available here. That table gives
every method the learning rate 1e-4, at which LoRA is undertrained. `:runlocal` runs 20
steps of a tiny, randomly initialised model on movie reviews: a smoke test, not a
result.
"""

import ml_collections

from configs import common

TINY = {
    "model_type": "t5",
    "vocab_size": 259,  # bytes
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 258,
    "pad_token_id": 258,
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config; `arg` may be `runlocal`."""
    args = common.parse_arg(arg, runlocal=False)
    config = common.checkpoint_run()

    config.run.name = "t5_glue_lora_ga"
    config.run.steps = 2_105  # one epoch of 67,349 examples

    config.model.source = "google-t5/t5-base"

    config.adapter.init = "lora_ga"
    config.adapter.options = (("scale", "stable"), ("gamma", 16.0))
    config.adapter.calibration_batches = 8

    config.optimizer.learning_rate.lora = 1e-4
    config.optimizer.warmup_steps = 63  # 3 %

    config.data.task = "text_to_text"
    config.data.name = "SST-2"
    config.data.root = "glue"  # below the folder of data sets, or a path
    config.data.lengths = (128,)
    config.data.batch_size = 32

    if args["runlocal"]:
        common.shrink(config, TINY)
    return config.lock()
