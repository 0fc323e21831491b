"""Llama 2 7B on grade-school mathematics with PiSSA.

    lorax run --config=llama2_math_pissa

Claimed: GSM8K accuracy 44.54 at rank 8, in a reproduction (the LoRA-MGPO paper's table;
LoRA 42.08, full fine-tuning 59.36 there). Never run at full size: the checkpoint is not
available here. The published runs train on 100,000 rows of MetaMathQA, this one on
GSM8K's own 7,473. It is scored by bits per byte of the answers, not by accuracy.

`:runlocal` adapts the real model of 260 thousand parameters in `stories260k` for 200
steps: it learns the form of the answers, not mathematics.
"""

import ml_collections

from configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config; `arg` may be `runlocal`."""
    args = common.parse_arg(arg, runlocal=False)
    config = common.checkpoint_run()

    config.run.name = "llama2_math_pissa"
    config.run.steps = 234  # one epoch of 7,473 examples
    config.run.log_every = 10

    config.model.source = "meta-llama/Llama-2-7b-hf"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"

    config.adapter.init = "pissa"
    config.adapter.rank = 8
    config.adapter.alpha = 8.0

    config.optimizer.learning_rate.lora = 2e-5
    config.optimizer.warmup_steps = 7  # 3 %

    config.data.task = "instructions"
    config.data.train = "gsm8k/train.jsonl.gz"  # below the folder of data sets
    config.data.valid = "gsm8k/test.jsonl.gz"
    config.data.template = "Question: {prompt}\nAnswer: "
    config.data.lengths = (256, 512)
    config.data.batch_size = 32

    config.eval.every = 100

    if args["runlocal"]:
        config.run.steps = 200
        config.model.source = "stories260k"
        config.model.dtype, config.model.remat = "", "none"
        config.adapter.rank, config.adapter.alpha = 4, 4.0
        config.optimizer.learning_rate.lora = 5e-3
        config.data.train_rows = 2_000
        config.data.lengths = (256, 512)
        config.data.batch_size = 8
        config.eval.rows = 64
    return config.lock()
