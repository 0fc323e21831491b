"""Which matrices should have adapters, at a fixed number of trained parameters?

In every arm, a layer's adapters have 8,192 parameters and scale 2; norms are trained,
the head is not. The paper's own table covers only attention.

References:
  Hu et al., LoRA, arXiv:2106.09685, section 7.1 and table 5.
"""

from typing import Any

from experiments.studies.method import panels, scorecard, text

PARAMETERS = 8_192  # per layer; the model is 256 wide, its MLP 768
SIZES = {"q": 512, "k": 512, "v": 512, "o": 512, "up": 1_024, "down": 1_024}
"""Parameters of a rank-1 adapter."""
SETS = ("q", "q k", "q v", "q k v o", "up down", "q k v o up down")


def _arm(chosen: str) -> dict[str, Any]:
    matrices = chosen.split()
    rank = PARAMETERS // sum(SIZES[matrix] for matrix in matrices)
    return {
        "adapter.patterns": (f".*/({'|'.join(matrices)})/kernel",),
        "adapter.rank": rank,
        "adapter.alpha": 2.0 * rank,
    }


STUDY = text.Study(
    "matrices",
    "At a fixed budget, is it better to adapt few matrices or all?",
    {chosen: _arm(chosen) for chosen in SETS},
    "q v",
)
PAIRS = (("q k v o up down", "up down"), ("q k v o up down", "q k v o"))
"""Further pairs that the page compares."""
PANELS = (panels.curves, panels.rates)
CLAIMS = tuple(
    scorecard.Lower(claimed, "2106.09685", arm, other)
    for claimed, arm, other in (
        ("At one budget, adapting q and v beats q alone", "q v", "q"),
        ("At one budget, adapting q and v beats q and k", "q v", "q k"),
        ("At one budget, adapting q, k, v and o beats q and v", "q k v o", "q v"),
    )
)
"""The paper's claims, from its table 5."""


def claims(results: Any) -> list[scorecard.Claim]:
    """Returns what the paper claims about the arms."""
    return scorecard.of_arms(results, CLAIMS)
