"""Muon on the factors against Adam.

Muon replaces a factor's step by the nearest one with equal singular values: for b only
(a follows Adam at 1e-2, LoRA's best rate), for both, or for both in the metric of the
other factor ("whitened").

References:
  Jordan et al., Muon (2024); the variants are `lorax.optim.muon`'s.
"""

from typing import Any

from experiments.studies.method import panels, text

CHOICES = ("b", "both", "whitened")
OTHER_RATE = 1e-2  # for what follows Adam: norms, and a


def _arm(factors: str) -> dict[str, Any]:
    options = (("factors", factors), ("adam_learning_rate", OTHER_RATE))
    return {"optimizer.name": "muon_factors", "optimizer.options": options}


STUDY = text.Study(
    "muon",
    "Do the factors learn faster by Muon's steps than by Adam's?",
    {"Adam": {}, **{f"Muon, {factors}": _arm(factors) for factors in CHOICES}},
    "Adam",
)
PANELS = (panels.curves, panels.rates)
