"""DeBERTaV3-base on a GLUE task with LoRA, after the AdaLoRA paper's comparison.

    lorax run --config=deberta_v3_glue_lora \
        --config.data.root=/path/to/glue_data

Claimed: MNLI accuracy 90.65 (mismatched 90.69) with 1.33 M parameters, GLUE average
88.34 (Zhang et al., arXiv:2303.10512, table 1, row "LoRA (r=8)"; full fine-tuning 89.90
and 88.09). Never run at full size: neither the checkpoint nor GLUE is available here.
Rank, matrices, batch and epochs are the paper's; so is the learning rate, though it was
published only for AdaLoRA. It decays linearly there and by a cosine here; the
classifier's dropout of 0.15 is left out.

Microsoft's repository has neither safetensors nor a tokenizer.json: save the model once
with transformers, `AutoModel.from_pretrained(...).save_pretrained(folder)`, and the
tokenizer likewise, and give `--config.model.source=folder`.

`:runlocal` runs 20 steps of a tiny, randomly initialised model on movie reviews: a
smoke test, not a result.
"""

import ml_collections

from configs import common

TINY = {
    "model_type": "deberta-v2",
    "vocab_size": 259,  # bytes
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 200,
    "position_biased_input": False,
    "relative_attention": True,
    "pos_att_type": "p2c|c2p",
    "position_buckets": 16,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config; `arg` may be `runlocal`."""
    args = common.parse_arg(arg, runlocal=False)
    config = common.checkpoint_run()

    config.run.name = "deberta_v3_glue_lora"
    config.run.steps = 85_904  # 7 epochs of 392,702 examples

    config.model.source = "microsoft/deberta-v3-base"
    config.model.labels = 3

    config.adapter.patterns = (".*/(q|k|v|o|up|down)/kernel",)
    config.adapter.rank = 8
    config.adapter.alpha = 16.0
    config.adapter.train_whole = ("classifier_.*",)

    config.optimizer.learning_rate.lora = 5e-4
    config.optimizer.warmup_steps = 1_000

    config.data.task = "classification"
    config.data.name = "MNLI"
    config.data.root = "glue"  # below the folder of data sets, or a path
    config.data.lengths = (64, 128, 256)
    config.data.batch_size = 32

    config.eval.every = 3_000

    if args["runlocal"]:
        common.shrink(config, TINY)
    return config.lock()
