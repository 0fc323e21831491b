"""Optimisers: optax gradient transformations over adapter trees."""

from lorax.optim._adalora import AdaLoraState, adalora
from lorax.optim._adalora_schedule import BudgetSchedule
from lorax.optim._adalora_shrink import (
    adalora_budget,
    adalora_effective_ranks,
    adalora_shrink,
)
from lorax.optim._diagnostics import (
    AdamDiagnostics,
    adam_diagnostics,
    hessian_row_norms,
)
from lorax.optim._noise_scale import NoiseScaleState, noise_scale, track_noise_scale

__all__ = [
    "AdaLoraState",
    "AdamDiagnostics",
    "BudgetSchedule",
    "NoiseScaleState",
    "adalora",
    "adalora_budget",
    "adalora_effective_ranks",
    "adalora_shrink",
    "adam_diagnostics",
    "hessian_row_norms",
    "noise_scale",
    "track_noise_scale",
]
