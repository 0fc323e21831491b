"""Llama 2 7B on grade-school mathematics with DoRA.

    lorax run --config=llama2_math_dora

Claimed: GSM8K accuracy 53.07 at rank 8, in a reproduction (the LoRA-MGPO paper's table;
LoRA 42.08 there, at one learning rate for all). Never run at full size; see
`llama2_math_pissa.py` for what differs from the published runs, and for `:runlocal`.
"""

import ml_collections

from configs import llama2_math_pissa


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config; `arg` may be `runlocal`."""
    config = llama2_math_pissa.get_config(arg).unlock()
    config.run.name = "llama2_math_dora"
    config.adapter.adapter = "dora"
    config.adapter.init = "standard"
    config.adapter.alpha = 2.0 * config.adapter.rank
    config.optimizer.learning_rate.lora = 5e-3 if arg else 2e-4
    return config.lock()
