"""RoBERTa-base on a GLUE task with LoRA, after the LoRA paper.

    lorax run --config=roberta_glue_lora \
        --config.data.root=/path/to/glue_data

Claimed: MNLI accuracy 87.5 with 0.3 M parameters (Hu et al., arXiv:2106.09685, table 2,
row "RoB base (LoRA)"; full fine-tuning 87.6). Never run at full size: neither the
checkpoint nor GLUE is available here. Hyperparameters are the paper's (its table 9,
MNLI), but its learning rate decays linearly, here by a cosine.

`:runlocal` runs 20 steps of a tiny, randomly initialised model on movie reviews: a
smoke test, not a result.
"""

import ml_collections

from configs import common

TINY = {
    "model_type": "roberta",
    "vocab_size": 259,  # bytes
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 200,
    "type_vocab_size": 1,
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config; `arg` may be `runlocal`."""
    args = common.parse_arg(arg, runlocal=False)
    config = common.checkpoint_run()

    config.run.name = "roberta_glue_lora"
    config.run.steps = 736_320  # 30 epochs of 392,702 examples

    config.model.source = "FacebookAI/roberta-base"
    config.model.labels = 3

    config.adapter.patterns = (".*/(q|v)/kernel",)
    config.adapter.rank = 8
    config.adapter.alpha = 8.0
    config.adapter.train_whole = ("classifier_.*",)

    config.optimizer.learning_rate.lora = 5e-4
    config.optimizer.warmup_steps = 44_179  # 6 %
    config.optimizer.weight_decay = 0.1

    config.data.task = "classification"
    config.data.name = "MNLI"
    config.data.root = "glue"  # below the folder of data sets, or a path
    config.data.lengths = (64, 128, 512)
    config.data.batch_size = 16

    config.eval.every = 10_000

    if args["runlocal"]:
        common.shrink(config, TINY)
    return config.lock()
