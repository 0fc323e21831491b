"""Learning-rate laws: how to adjust a tuned learning rate when something else changes.

Every law is a ratio, `lr(new) = lr(old) * f(new) / f(old)`: the constant factor was
tuned at a known batch size or rank, with everything else held fixed. Batch sizes and
noise scales are in the same unit, examples or tokens.
"""

from lorax._checks import Number
from lorax.scaling.batch import (
    BATCH_RULES,
    BatchRule,
    batch_for_learning_rate,
    learning_rate_for_batch,
)
from lorax.scaling.epsilon import (
    adam_epsilon_for_batch,
    adam_epsilon_learning_rate,
    adam_epsilon_shrinkage,
    softsign,
)
from lorax.scaling.rank import (
    LORA_PLUS_RANGE,
    Scaling,
    learning_rate_for_rank,
    lora_plus_ratio,
)

__all__ = [
    "BATCH_RULES",
    "LORA_PLUS_RANGE",
    "BatchRule",
    "Number",
    "Scaling",
    "adam_epsilon_for_batch",
    "adam_epsilon_learning_rate",
    "adam_epsilon_shrinkage",
    "batch_for_learning_rate",
    "learning_rate_for_batch",
    "learning_rate_for_rank",
    "lora_plus_ratio",
    "softsign",
]
