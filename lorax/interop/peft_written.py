"""The `adapter_config.json` that goes with adapters of ours."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from lorax.interop import peft_config
from lorax.interop.factors import Module
from lorax.interop.peft_base import Base, short_names

FREE = peft_config.HARMLESS | {"lora_dropout"}


def fields(
    kind: str,
    modules: Sequence[Module],
    saved: Sequence[str],
    base: Base,
    rates: Collection[float],
    rank_stabilized: bool,
    given: dict[str, Any],
) -> dict[str, Any]:
    """Returns the fields.

    Args:
      kind: "lora", "dora" or "adalora".
      modules: with their factors; of AdaLoRA one scale is made of all by the caller.
      saved: keys of whole tensors.
      base: the model.
      rates: of dropout.
      rank_stabilized: for rsLoRA's scale.
      given: fields that win, none of which may change the function.

    Raises:
      ValueError: fields that are not free, or rates that differ.
    """
    if odd := sorted(set(given) - FREE):
        raise ValueError(
            f"fields={odd} follow from the adapters; free are {', '.join(sorted(FREE))}"
        )
    if len(set(rates)) > 1 and "lora_dropout" not in given:
        raise ValueError(
            f"PEFT has one lora_dropout, and the adapters have {sorted(set(rates))}; "
            "choose by fields={'lora_dropout': ...}"
        )
    names = [module.name for module in modules]
    whole = sorted({key.rpartition(".")[0] for key in saved})
    every = {key.rpartition(".")[0] for key in base.where} | {base.head} - {""}
    found = {
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "init_lora_weights": True,
        "bias": "none",
        "use_dora": kind == "dora",
        "use_rslora": rank_stabilized,
        "lora_dropout": next(iter(rates), 0.0),
        "fan_in_fan_out": any(
            not base.modules[name].entry.transposed and "embedding" not in path
            for name in names
            for path in [base.modules[name].path]
        ),
        "target_modules": short_names(names, every - set(names)),
        "modules_to_save": whole or None,
    }
    if base.head and {base.embedding, base.head} & {*names, *whole}:
        found["ensure_weight_tying"] = base.embedding.endswith("embed_tokens")
    ranks = _adalora(modules) if kind == "adalora" else _lora(modules, rank_stabilized)
    return {**found, **ranks, **given}


def _lora(modules: Sequence[Module], rank_stabilized: bool) -> dict[str, Any]:
    """The common rank and alpha, and the patterns of those that differ."""
    ranks = {m.name: m.a.shape[1] for m in modules}
    root = math.sqrt if rank_stabilized else float
    alphas = {m.name: _whole(m.scale * root(ranks[m.name])) for m in modules}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
    }


def _pattern(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """Returns the values that are not the default, by the ends of names."""
    found: dict[str, Any] = {}
    for value in sorted(set(values.values()) - {default}):
        chosen = [name for name, own in values.items() if own == value]
        others = [name for name, own in values.items() if own != value]
        found |= dict.fromkeys(short_names(chosen, others), value)
    return found


def _adalora(modules: Sequence[Module]) -> dict[str, Any]:
    """AdaLoRA's fields; PEFT divides alpha by the initial rank plus 1e-5."""
    ranks = {m.name: m.a.shape[1] for m in modules}
    rank = max(1, *ranks.values())
    pattern = {
        f"{name}.lora_E": [True] * own + [False] * (rank - own)
        for name, own in ranks.items()
    }
    return {
        "peft_type": "ADALORA",
        "use_rslora": False,
        "init_r": rank,
        "target_r": rank,
        "lora_alpha": modules[0].scale * (rank + peft_config.RANKNUM),
        "rank_pattern": pattern if len(set(ranks.values())) > 1 else None,
        "total_step": 1,  # PEFT wants one above 0; the budget is not to change again
        "tinit": 0,
        "tfinal": 0,
    }


def _whole(value: float) -> float:
    """The integer that a product of scale and rank was rounded off from, if any."""
    near = round(value)
    return near if math.isclose(value, near, rel_tol=1e-12) else value
