"""T5-base on a GLUE task, text to text, with LoRA-Pro.

    lorax run --config=t5_glue_lora_pro \
        --config.data.root=/path/to/glue_data

Claimed: five tasks on average 88.44 (Wang et al., arXiv:2407.18242, table 1, row
"LoRA-Pro"; full fine-tuning 87.91). Never run at full size: neither the checkpoint nor
GLUE is available here. The mode is "rowcol", where the paper has "full" (set
`--config.optimizer.options` for that). `:runlocal` is a smoke test, not a result.
"""

import ml_collections

from configs import t5_glue_lora_ga


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config; `arg` may be `runlocal`."""
    config = t5_glue_lora_ga.get_config(arg).unlock()
    config.run.name = "t5_glue_lora_pro"
    config.adapter.init = "standard"
    config.adapter.options = ()
    config.adapter.scaling = "rank_stabilized"
    config.optimizer.name = "lora_pro"
    config.optimizer.options = (("mode", "rowcol"),)
    return config.lock()
