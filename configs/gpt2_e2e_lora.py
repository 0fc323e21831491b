"""GPT-2 medium on the E2E NLG challenge with LoRA, after the LoRA paper.

    lorax run --config=gpt2_e2e_lora
    lorax run --config=gpt2_e2e_lora:runlocal

Claimed: BLEU 70.4 +- 0.1 with 0.35 M parameters (Hu et al., arXiv:2106.09685, table 3,
row "GPT-2 M (LoRA)"; full fine-tuning 68.2). Never run at full size: the checkpoint is
not available here. Hyperparameters are the paper's (its table 11, E2E), with two
differences: the released code adapts the q and v parts of the fused kernel, while here
the kernel has one adapter for q, k and v together; and its learning rate decays
linearly, here by a cosine.

`:runlocal` adapts a real model of 260 thousand parameters, trained on stories, to the
same data: `stories260k` in the folder of data sets (`$LORAX_DATA`).
"""

import ml_collections

from configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config; `arg` may be `runlocal`."""
    args = common.parse_arg(arg, runlocal=False)
    config = common.checkpoint_run()

    config.run.name = "gpt2_e2e_lora"
    config.run.steps = 26_285  # 5 epochs of 42,061 examples
    config.run.label_smoothing = 0.1

    config.model.source = "openai-community/gpt2-medium"

    config.adapter.patterns = (".*/qkv/kernel",)
    config.adapter.rank = 4
    config.adapter.alpha = 32.0
    config.adapter.dropout = 0.1

    config.optimizer.learning_rate.lora = 2e-4
    config.optimizer.warmup_steps = 500
    config.optimizer.weight_decay = 0.01

    config.data.task = "e2e"
    config.data.form = "lora_format"
    config.data.lengths = (128, 256, 512)
    config.data.batch_size = 8

    config.eval.every = 2_000
    config.eval.batch_size = 16
    config.eval.test = 630
    config.eval.max_tokens = 128
    config.eval.beams = 10
    config.eval.length_penalty = 0.8
    config.eval.no_repeat = 4

    if args["runlocal"]:
        _shrink(config)
    return config.lock()


def _shrink(config: ml_collections.ConfigDict) -> None:
    """Takes a real model of 260 thousand parameters, on the same data."""
    config.run.steps = 1_000
    config.run.log_every = 50
    config.run.label_smoothing = 0.0
    config.model.source = "stories260k"
    config.adapter.patterns = ("all-linear",)  # width 64: q and v are not enough
    config.adapter.dropout = 0.0
    config.optimizer.learning_rate.lora = 1e-2
    config.optimizer.learning_rate.full = 2e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 0.0
    config.data.lengths = (112, 160, 208, 344)
    config.data.batch_size = 32
    config.eval.every = 250
    config.eval.final_rows = config.eval.rows  # of 4,672
    config.eval.batch_size = 32
    config.eval.max_tokens = 160
    config.eval.beams = 4
