"""Initialisations: the first 200 steps.

References:
  Hu et al., arXiv:2106.09685; Meng et al., PiSSA, arXiv:2404.02948; Buyukakyuz, OLoRA,
  arXiv:2406.01775; Wang et al., LoRA-GA, arXiv:2407.05000, figure 1.
"""

from typing import Any

from experiments.studies.method import panels, scorecard, text

STUDY = text.Study(
    "inits",
    "Which initialisation learns fastest in the first 200 steps?",
    {
        "LoRA": {},
        "PiSSA": {"adapter.init": "pissa", "adapter.alpha": 8.0},
        "OLoRA": {"adapter.init": "olora", "adapter.alpha": 8.0},
        "LoRA-GA": {
            "adapter.init": "lora_ga",
            "adapter.options": (("scale", "stable"),),
        },
    },
    "LoRA",
    steps=200,
    every=20,
    seeds=(1, 2, 3),
)

PANELS = (panels.rates, panels.curves)
CLAIMS = tuple(
    scorecard.Lower(f"A run from {arm}'s init learns faster than from LoRA's", *rest)
    for arm, *rest in (
        ("PiSSA", "2404.02948", "PiSSA", "LoRA"),
        ("OLoRA", "2406.01775", "OLoRA", "LoRA"),
        ("LoRA-GA", "2407.05000", "LoRA-GA", "LoRA"),
    )
)
"""The papers' claims."""


def claims(results: Any) -> list[scorecard.Claim]:
    """Returns what the papers claim about the arms."""
    return scorecard.of_arms(results, CLAIMS)
