"""Optimisers: optax gradient transformations over adapter trees.

As in optax, import names from the package itself; modules with a leading underscore are
private. `order`, which checks the order of a chain, is used by `lorax.training`.
"""

from lorax.optim._adalora import AdaLoraState, adalora
from lorax.optim._adalora_schedule import BudgetSchedule
from lorax.optim._adalora_shrink import (
    adalora_budget,
    adalora_effective_ranks,
    adalora_shrink,
)
from lorax.optim._decay import add_decayed_weights, decay_mask
from lorax.optim._diagnostics import (
    AdamDiagnostics,
    adam_diagnostics,
    hessian_row_norms,
)
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
from lorax.optim._lora_rite import (
    ScaleByLoraRiteState,
    lora_rite,
    scale_by_lora_rite,
)
from lorax.optim._muon import ScaleByMuonFactorsState, muon, scale_by_muon_factors
from lorax.optim._noise_scale import NoiseScaleState, noise_scale, track_noise_scale
from lorax.optim._reflora import reflora, scale_by_reflora
from lorax.optim._riemannian import riemannian, scale_by_gram
from lorax.optim._riemannion import (
    ScaleByRiemannionState,
    retract,
    riemannion,
    scale_by_riemannion,
)
from lorax.optim._spectral import DecayedSpectralNormState, add_decayed_spectral_norm
from lorax.optim._spectral_clip import ClipSpectralNormState, clip_spectral_norm
from lorax.optim._split_decay import SplitDecayState, split_decay

__all__ = [
    "AdamDiagnostics",
    "adam_diagnostics",
    "hessian_row_norms",
    "AdaLoraState",
    "BudgetSchedule",
    "ClipSpectralNormState",
    "DecayedSpectralNormState",
    "NoiseScaleState",
    "ScaleByFullState",
    "ScaleByLoraPlusState",
    "ScaleByLoraRiteState",
    "ScaleByMuonFactorsState",
    "ScaleByRiemannionState",
    "ScaleByRowColState",
    "SplitDecayState",
    "adalora",
    "adalora_budget",
    "adalora_effective_ranks",
    "adalora_shrink",
    "add_decayed_spectral_norm",
    "add_decayed_weights",
    "clip_spectral_norm",
    "decay_mask",
    "lora_fa",
    "lora_plus",
    "lora_pro",
    "lora_rite",
    "muon",
    "noise_scale",
    "reflora",
    "retract",
    "riemannian",
    "riemannion",
    "scale_by_gram",
    "scale_by_lora_fa",
    "scale_by_lora_plus",
    "scale_by_lora_pro",
    "scale_by_lora_pro_full",
    "scale_by_lora_pro_rowcol",
    "scale_by_lora_rite",
    "scale_by_muon_factors",
    "scale_by_reflora",
    "scale_by_riemannion",
    "split_decay",
    "track_noise_scale",
]
