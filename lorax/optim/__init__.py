"""Optimisers: optax gradient transformations over adapter trees."""

from lorax.optim._decay import add_decayed_weights, decay_mask
from lorax.optim._lora_fa import lora_fa, scale_by_lora_fa
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
from lorax.optim._riemannian import riemannian, scale_by_gram

__all__ = [
    "ScaleByFullState",
    "ScaleByLoraPlusState",
    "ScaleByRowColState",
    "add_decayed_weights",
    "decay_mask",
    "lora_fa",
    "lora_plus",
    "lora_pro",
    "riemannian",
    "scale_by_gram",
    "scale_by_lora_fa",
    "scale_by_lora_plus",
    "scale_by_lora_pro",
    "scale_by_lora_pro_full",
    "scale_by_lora_pro_rowcol",
]
