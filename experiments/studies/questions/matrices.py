"""Which matrices should have adapters, at a fixed number of trained parameters?

A layer's adapters have 8,192 parameters in every arm, and scale 2; norms are trained in
all of them, the head in none. The paper's own table is of attention alone.

References:
  Hu et al., LoRA, arXiv:2106.09685, section 7.1 and table 5.
"""

from typing import Any

from experiments.studies.method import panels, scorecard, text

PARAMETERS = 8_192  # of a layer; the model is 256 wide, its MLP 768
SIZES = {"q": 512, "k": 512, "v": 512, "o": 512, "up": 1_024, "down": 1_024}
"""Parameters of an adapter of rank one."""
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
"""Further pairs that the table holds against each other."""
PANELS = (panels.curves, panels.rates)
CLAIMS = tuple(
    scorecard.Lower(claimed, "2106.09685", arm, other)
    for claimed, arm, other in (
        ("One budget does more on q and v than on q alone", "q v", "q"),
        ("One budget does more on q and v than on q and k", "q v", "q k"),
        ("One budget does more on all of attention than on q and v", "q k v o", "q v"),
    )
)
"""Of the paper, its table 5."""


def claims(results: Any) -> list[scorecard.Claim]:
    """What the paper claims of the arms."""
    return scorecard.of_arms(results, CLAIMS)
