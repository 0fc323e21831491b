"""Optimisers: optax gradient transformations over adapter trees."""

from lorax.optim._decay import add_decayed_weights, decay_mask
from lorax.optim._lora_plus import (
    ScaleByLoraPlusState,
    lora_plus,
    scale_by_lora_plus,
)
from lorax.optim._lora_pro import lora_pro, scale_by_lora_pro
from lorax.optim._lora_pro_moments import (
    ScaleByFullState,
    ScaleByRowColState,
    scale_by_lora_pro_full,
    scale_by_lora_pro_rowcol,
)

__all__ = [
    "ScaleByFullState",
    "ScaleByLoraPlusState",
    "ScaleByRowColState",
    "add_decayed_weights",
    "decay_mask",
    "lora_plus",
    "lora_pro",
    "scale_by_lora_plus",
    "scale_by_lora_pro",
    "scale_by_lora_pro_full",
    "scale_by_lora_pro_rowcol",
]
