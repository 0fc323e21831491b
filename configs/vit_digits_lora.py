"""ViT-base on scikit-learn's digits with LoRA on queries and values.

    lorax run --config=vit_digits_lora

Never run at full size: the checkpoint is not available here, and no published number
for these digits is known. Rank, learning rate and what trains whole are those of PEFT's
own example, `examples/image_classification`, ViT-base on Food101. For a small ViT
trained from scratch see docs/results/images.md.

For images of your own give `--config.data.name` an .npz file or a folder, see
`experiments/data/vision/image_sets.py`, and `--config.model.labels` the number of their
classes.

`:runlocal` runs 20 steps of a tiny, randomly initialised model: a smoke test, not a
result.
"""

import ml_collections

from configs import common

TINY = {
    "model_type": "vit",
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config; `arg` may be `runlocal`."""
    args = common.parse_arg(arg, runlocal=False)
    config = common.checkpoint_run()

    config.run.name = "vit_digits_lora"
    config.run.steps = 225  # 20 epochs of 1,437 images
    config.run.log_every = 25

    config.model.source = "google/vit-base-patch16-224-in21k"
    config.model.labels = 10

    config.adapter.patterns = (".*/(q|v)/kernel",)
    config.adapter.rank = 16
    config.adapter.alpha = 16.0
    config.adapter.train_whole = ("classifier_out/.*",)

    config.optimizer.learning_rate.lora = 5e-3
    config.optimizer.warmup_steps = 20

    config.data.task = "images"
    config.data.name = "digits"
    config.data.classes = ()  # indices of the classes to keep; () for all
    config.data.held_out = 0.2  # of every class
    config.data.split_seed = 0
    config.data.batch_size = 128

    config.eval.every = 45

    if args["runlocal"]:
        config.run.steps, config.run.log_every = 20, 5
        config.model.random = ml_collections.ConfigDict(TINY)
        config.optimizer.warmup_steps = 2
        config.data.batch_size = 32
        config.eval.rows, config.eval.every = 64, 10
    return config.lock()
