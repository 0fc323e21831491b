"""RoBERTa-base on a GLUE task with AdaLoRA: a total rank that goes where it is felt.

    python -m experiments.main --config=configs/roberta_glue_adalora.py \
        --config.data.root=/path/to/glue_data

Claimed, for DeBERTaV3-base, not for this model: GLUE average 89.31 with 1.27 M
parameters, against 88.34 of LoRA (Zhang et al., arXiv:2303.10512, table 1). Never run
at full size: neither the checkpoint nor GLUE can be had here. `:runlocal` is a path
check, no result.
"""

import ml_collections

from configs import roberta_glue_lora


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config; `arg` may be `runlocal`."""
    config = roberta_glue_lora.get_config(arg).unlock()
    config.run.name = "roberta_glue_adalora"
    config.adapter.patterns = ("all-linear",)
    config.adapter.adapter = "adalora"
    config.adapter.rank = 12  # 1.5 times the rank at the end
    config.adapter.alpha = 12.0
    matrices = 6 * (config.model.random.get("num_hidden_layers") or 12)
    steps = config.run.steps
    config.optimizer.wrap = (
        (
            "adalora",
            {
                "target_budget": 8 * matrices,
                "total_steps": steps,
                "initial_warmup": steps // 10,
                "final_steps": steps // 3,
            },
        ),
    )
    return config.lock()
