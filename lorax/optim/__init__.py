"""Optimisers: optax gradient transformations over adapter trees."""

from lorax.optim._decay import add_decayed_weights, decay_mask
from lorax.optim._lora_plus import (
    ScaleByLoraPlusState,
    lora_plus,
    scale_by_lora_plus,
)

__all__ = [
    "ScaleByLoraPlusState",
    "add_decayed_weights",
    "decay_mask",
    "lora_plus",
    "scale_by_lora_plus",
]
