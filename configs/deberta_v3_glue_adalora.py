"""DeBERTaV3-base on a GLUE task with AdaLoRA: the total rank goes where it matters.

    lorax run --config=deberta_v3_glue_adalora \
        --config.data.root=/path/to/glue_data

Claimed: MNLI accuracy 90.76 (mismatched 90.79) with 1.27 M parameters, GLUE average
89.31, against LoRA's 90.65 and 88.34 (Zhang et al., arXiv:2303.10512, table 1). Never
run at full size: neither the checkpoint nor GLUE is available here. The learning rate,
warm-ups and interval are those of the released NLU/scripts/run_debertav3_mnli.sh, whose
ranks of 3 and 1 are the smallest in the table. For the checkpoint see
`deberta_v3_glue_lora`. `:runlocal` is a smoke test, not a result.
"""

import ml_collections

from configs import deberta_v3_glue_lora


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config; `arg` may be `runlocal`."""
    full = deberta_v3_glue_lora.get_config().run.steps
    config = deberta_v3_glue_lora.get_config(arg).unlock()
    config.run.name = "deberta_v3_glue_adalora"
    config.adapter.adapter = "adalora"
    config.adapter.rank = 12  # 1.5 times the rank at the end
    matrices = 6 * (config.model.random.get("num_hidden_layers") or 12)
    steps = config.run.steps
    config.optimizer.wrap = (
        (
            "adalora",
            {
                "target_budget": 8 * matrices,
                "total_steps": steps,
                "initial_warmup": 8_000 * steps // full,
                "final_steps": 50_000 * steps // full,
                "interval": max(1, 100 * steps // full),
            },
        ),
    )
    return config.lock()
