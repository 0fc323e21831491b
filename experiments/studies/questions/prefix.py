"""Prefix-tuning combined with LoRA.

The claim: low-rank updates are orthogonal to prefix-tuning, so both together learn more
than either. A prefix is learned positions before every sequence, which give no logits.
Beside LoRA, its rate is the adapters' or ten times that; alone, it has its own grid.
LoRA at twice the rank shows what as many parameters, or more, achieve without a prefix.

References:
  Hu et al., LoRA, arXiv:2106.09685, section 1 and appendix E (LoRA+PrefixEmbed).
  Li and Liang, Prefix-Tuning, arXiv:2101.00190.
"""

from typing import Any

from experiments.studies.method import panels, text

PLACES = (16, 64)
FACTORS = (1, 10)  # the prefix's rate over the adapters'
WHOLE = (".*norm.*/scale", "prefix")


def _alone(places: int) -> dict[str, Any]:
    return {
        "adapter.prefix": places,
        "adapter.patterns": (),
        "adapter.train_whole": WHOLE,
    }


def _both(places: int, factor: float) -> dict[str, Any]:
    links = (
        ("adam", {"b1": 0.9, "b2": 0.98}),  # the quickstart's
        ("scale_by_path", (("prefix", float(factor)),)),
    )
    return {
        "adapter.prefix": places,
        "adapter.train_whole": WHOLE,
        "optimizer.name": "chain",
        "optimizer.chain": links,
    }


def name(places: int, factor: int) -> str:
    """Returns the name of an arm that trains both."""
    return f"LoRA + prefix {places}" + (f", rate x {factor}" if factor > 1 else "")


STUDY = text.Study(
    "prefix",
    "Does a learned prefix add to what LoRA learns?",
    {
        "LoRA": {},
        "LoRA r = 16": {"adapter.rank": 16, "adapter.alpha": 32.0},
        **{f"prefix {places}": _alone(places) for places in PLACES},
        **{name(p, factor): _both(p, factor) for p in PLACES for factor in FACTORS},
    },
    "LoRA",
    # embedding rows need a larger rate than factors
    grids={f"prefix {p}": tuple(10**0.5 * g for g in text.GRID) for p in PLACES},
)


PANELS = (panels.by_arm, panels.rates)
