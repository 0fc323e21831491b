"""Writes the fields of `adapter_config.json` for our adapters."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lorax.interop import peft_config, peft_parameters, peft_table
from lorax.interop.factors import Module
from lorax.interop.peft_base import WEIGHT, Base, short_names
from lorax.interop.peft_forms import Form, near_whole
from lorax.interop.peft_selection import ALWAYS_HARMLESS

FREE = peft_config.HARMLESS | {"lora_dropout", "layer_replication"}
"""Fields of LoRA and AdaLoRA that a caller may give."""


def fields(
    kind: str,
    modules: Sequence[Module],
    *,
    saved: Sequence[str],
    bias: str,
    tokens: Mapping[str, list[int]],
    parameters: Sequence[Module],
    base: Base,
    rates: Collection[float],
    rank_stabilized: bool,
    given: dict[str, Any],
) -> dict[str, Any]:
    """Returns the fields.

    Args:
      kind: registered name of the adapters' class.
      modules: with their factors; for AdaLoRA the caller has given all one scale.
      saved: keys of the tensors of modules saved in full.
      bias: which biases are stored as well.
      tokens: trained rows of embeddings, by module.
      parameters: one module for each parameter that PEFT adapts directly.
      base: the model.
      rates: the dropout rates.
      rank_stabilized: whether to use rsLoRA's scale.
      given: fields that take precedence; none may affect the function.

    Raises:
      ValueError: a given field is not free, or dropout rates differ.
    """
    form = peft_table.FORMS.get(kind)
    own = {form.dropout, *form.free} - {""} if form else set()
    free = ALWAYS_HARMLESS | own if form else FREE
    dropout = form.dropout if form else "lora_dropout"
    if odd := sorted(set(given) - free):
        raise ValueError(
            f"fields={odd} follow from the adapters; only {', '.join(sorted(free))} "
            "can be given"
        )
    if form and rank_stabilized:
        raise ValueError(
            f"rank_stabilized=True is for LoRA; PEFT's {form.peft_type} has no such "
            "field"
        )
    if form and (bias != "none" or tokens):
        raise ValueError(
            f"PEFT's {form.peft_type} stores no biases and no rows of embeddings with "
            "its factors here; use Lora, or save the two sets separately"
        )
    if not dropout and any(rates):
        raise ValueError(
            f"PEFT's {kind} has no dropout, but the adapters have {sorted(set(rates))}"
            "; remove it with adapter.replace(dropout=0.0)"
        )
    if len(set(rates)) > 1 and dropout not in given:
        raise ValueError(
            f"PEFT has one {dropout}, but the adapters have {sorted(set(rates))}; "
            f"choose one with fields={{{dropout!r}: ...}}"
        )
    rate = next(iter(rates), 0.0)
    found: dict[str, Any] = {"task_type": None, "inference_mode": True}
    if dropout:
        found[dropout] = rate
    is_router = peft_parameters.is_router
    routers = [m for m in modules if is_router(m.name, base)]
    modules = [m for m in modules if not is_router(m.name, base)]
    weights = [dataclasses.replace(m, name=m.name + WEIGHT) for m in routers]
    parameters = [*parameters, *weights]
    found |= _selection([module.name for module in modules], saved, base)
    if form:
        conv1d = found.pop("fan_in_fan_out")
        found |= {"fan_in_fan_out": conv1d} if "fan_in_fan_out" in form.free else {}
        found |= _of_form(form, modules)
        return {**found, **_listed(form, modules, base, found), **given}
    found |= {
        "peft_type": "LORA",
        "bias": bias,
        "trainable_token_indices": dict(tokens) or None,
        "init_lora_weights": True,
        "use_dora": kind == "dora",
        "use_rslora": rank_stabilized,
    }
    every = [*modules, *parameters]
    ranks = _adalora(modules) if kind == "adalora" else _lora(every, rank_stabilized)
    found["target_parameters"] = _parameters(parameters, base) or None
    if found["target_parameters"] and (any(rates) or given.get("lora_dropout")):
        raise ValueError(
            "PEFT's target_parameters (experts, routers) do not allow lora_dropout, "
            f"but the adapters have {sorted(set(rates))}; remove it with "
            "adapter.replace(dropout=0.0)"
        )
    return {**found, **ranks, **given}


def _selection(
    names: Sequence[str], saved: Sequence[str], base: Base
) -> dict[str, Any]:
    """The fields that say which modules are adapted, and which are saved in full."""
    whole = sorted({key.rpartition(".")[0] for key in saved})
    every = {key.rpartition(".")[0] for key in base.where} | {base.head} - {""}
    found = {
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
    return found


def _parameters(parameters: Sequence[Module], base: Base) -> list[str]:
    """The ends of the names of parameters that PEFT adapts directly."""
    names = [module.name for module in parameters]
    return short_names(names, base.where.keys() - set(names)) if names else []


def _of_form(form: Form, modules: Sequence[Module]) -> dict[str, Any]:
    """The fields of a type in the table; patterns where modules differ."""
    each = {m.name: form.config(m) for m in modules}
    patterns = {of: name for name, of in form.patterns.items()}
    found: dict[str, Any] = {"peft_type": form.peft_type, **form.fixed}
    for field in set(form.fields) - set(form.lists):
        values = {name: own[field] for name, own in each.items()}
        found[field] = Counter(values.values()).most_common(1)[0][0]
        pattern = _pattern(values, found[field])
        if pattern and field not in patterns:
            raise ValueError(
                f"PEFT's {form.peft_type} has one {field}, but the adapters have "
                f"{sorted(set(values.values()))}; save them separately"
            )
        if field in patterns:
            found[patterns[field]] = pattern
    return found


def _listed(
    form: Form, modules: Sequence[Module], base: Base, found: dict[str, Any]
) -> dict[str, Any]:
    """The fields that list modules of a kind by ends of names, and the targets.

    PEFT requires every entry to appear literally in `target_modules`.
    """
    lists: dict[str, Any] = {}
    targets = set(found["target_modules"])
    every = {key.rpartition(".")[0] for key in base.where}
    for field, belongs in form.lists.items():
        chosen = [module.name for module in modules if belongs(module)]
        ends = short_names(chosen, every - set(chosen)) if chosen else []
        lists[field] = sorted(ends)
        targets |= set(ends)
    return lists and {**lists, "target_modules": sorted(targets)}


def _lora(modules: Sequence[Module], rank_stabilized: bool) -> dict[str, Any]:
    """The common rank and alpha, and patterns for modules that differ."""
    ranks = {m.name: m.rank for m in modules}
    root = math.sqrt if rank_stabilized else float
    alphas = {m.name: near_whole(m.scale * root(ranks[m.name])) for m in modules}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
    }


def _pattern(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """Returns the values other than the default, by the ends of names."""
    found: dict[str, Any] = {}
    for value in sorted(set(values.values()) - {default}):
        chosen = [name for name, own in values.items() if own == value]
        others = [name for name, own in values.items() if own != value]
        found |= dict.fromkeys(short_names(chosen, others), value)
    return found


def _adalora(modules: Sequence[Module]) -> dict[str, Any]:
    """AdaLoRA's fields; PEFT divides alpha by the initial rank plus 1e-5."""
    ranks = {m.name: m.rank for m in modules}
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
        "total_step": 1,  # PEFT needs a positive one; the budget does not change again
        "tinit": 0,
        "tfinal": 0,
    }
