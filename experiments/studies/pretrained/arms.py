"""The arms of the benchmark: how each differs from LoRA, and the rates that it tries.

What every arm shares is in `bases`. A field that has a default is written out where
the arm is about it, so that a run says what it was, whatever the defaults become.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lorax import models

RANK, ALPHA = 8, 16.0


class Arm(NamedTuple):
    """One way to train.

    Attributes:
      fields: of the config, where it differs from LoRA's.
      rates: of the grid, half a decade apart.
      differs: from LoRA of rank 8 on every linear kernel, in words.
    """

    fields: Mapping[str, Any]
    rates: tuple[float, ...]
    differs: str


def rates(lowest: float) -> tuple[float, ...]:
    """Four rates half a decade apart, from `10 ** lowest`."""
    return tuple(10 ** (lowest + k / 2) for k in range(4))


LORA = rates(-3.5)
BOTH = rates(-4)
"""For arms with both factors alive at the start, or with a larger scale or ratio."""
FULL = rates(-4.5)
SMALL = rates(-2.5)
"""For parameters that multiply small or normalised ones."""
REST = 10**-2.5
"""The rate of a fresh head in every arm, and of a where b has one in other units."""
ONE_RATE = {"optimizer.rates": ()}
"""For arms that give the head its rate in another way."""


def adalora(steps: int, matrices: int) -> dict[str, Any]:
    """From rank 12 to an average of 8, a matrix; the scale stays LoRA's."""
    start = 3 * RANK // 2
    budget = {
        "target_budget": RANK * matrices,
        "initial_warmup": steps // 10,
        "final_steps": steps // 3,
        "interval": 10,
        "orthogonal_form": "decoupled",
        "orthogonal_weight": 0.3,
    }
    return {
        "adapter.adapter": "adalora",
        "adapter.rank": start,
        "adapter.alpha": ALPHA / RANK * start,
        "optimizer.wrap": (("adalora", budget),),
    }


def optimized(name: str, **options: Any) -> dict[str, Any]:
    """LoRA by another optimiser."""
    return {"optimizer.name": name, "optimizer.options": tuple(options.items())}


def ranked(rank: int) -> dict[str, Any]:
    """LoRA of another rank at the same scale."""
    return {"adapter.rank": rank, "adapter.alpha": ALPHA / RANK * rank}


def on(pattern: str, rank: int) -> Arm:
    """LoRA on some kernels, of about as many parameters."""
    fields = {"adapter.patterns": (pattern,), **ranked(rank)}
    return Arm(fields, LORA, f"r = {rank}, about as many parameters")


def methods(steps: int, matrices: int) -> dict[str, Arm]:
    """The methods, in the order in which they run.

    Args:
      steps: of a run.
      matrices: that LoRA adapts.
    """
    unscaled = {"adapter.alpha": float(RANK)}
    return {
        "LoRA": Arm({}, LORA, "-"),
        "full": Arm({"run.methods": ("full",)}, FULL, "every parameter trains"),
        "head only": Arm(
            {"adapter.patterns": (), **ONE_RATE},
            LORA,
            "no adapter, the rate the head's",
        ),
        "rsLoRA": Arm(
            {"adapter.scaling": "rank_stabilized"}, BOTH, "scale 16 / sqrt(8)"
        ),
        "DoRA": Arm({"adapter.adapter": "dora"}, LORA, "and a magnitude per output"),
        "PiSSA": Arm({"adapter.init": "pissa", **unscaled}, BOTH, "scale 1"),
        "LoRA+": Arm(optimized("lora_plus", ratio=16.0), BOTH, "ratio 16"),
        "LoRA-GA": Arm(
            {
                "adapter.init": "lora_ga",
                "adapter.options": (("scale", "stable"), ("gamma", 16.0)),
            },
            BOTH,
            "8 batches of gradients first",
        ),
        "LoRA-Pro": Arm(
            optimized("lora_pro", mode="rowcol", damping=0.01),
            rates(-4),
            "mode rowcol, damping 0.01",
        ),
        "Muon": Arm(
            optimized("muon_factors", factors="b", adam_learning_rate=REST) | ONE_RATE,
            SMALL,
            f"of b; the rest by Adam at {REST:.2g}",
        ),
        "AdaLoRA": Arm(adalora(steps, matrices), SMALL, "r = 12, 8 on average at last"),
        "VeRA": Arm(
            {
                "adapter.adapter": "vera",
                "adapter.rank": 256,
                "adapter.options": (("d_initial", 0.1),),
            },
            SMALL,
            "r = 256, PEFT's",
        ),
        "OFT": Arm(
            {
                "adapter.adapter": "oft",
                "adapter.options": (("block_size", 32), ("cayley_terms", 5)),
            },
            BOTH,
            "blocks of 32, PEFT's",
        ),
        "LoRA-RITE": Arm(optimized("lora_rite"), LORA, "by its own optimiser"),
        "EVA": Arm({"adapter.init": "eva"}, LORA, "8 batches of inputs first"),
        "LoKr": Arm(
            {
                "adapter.adapter": "lokr",
                "adapter.options": (("factor", -1), ("decompose_both", False)),
            },
            LORA,
            "w1 whole, w2 of rank 8",
        ),
        "OLoRA": Arm({"adapter.init": "olora", **unscaled}, BOTH, "scale 1"),
    }


def sizes() -> dict[str, Arm]:
    """LoRA of other ranks, and on other kernels, behind the methods."""
    ranks = {
        f"LoRA r = {rank}": Arm(ranked(rank), LORA, f"r = {rank}")
        for rank in (1, 2, 4, 16, 64)
    }
    return ranks | {
        "LoRA, q and v": on(models.QUERY_VALUE, 36),
        "LoRA, attention": on(models.ATTENTION, 18),
        "LoRA, MLP": on(models.MLP, 14),
    }
