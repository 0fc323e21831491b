"""Maps adapters of leaves to PEFT's modules, with a tied head counted once."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
import numpy as np

from lorax import adapters as adapter_classes
from lorax.adapters import Lora
from lorax.interop import factors, peft_biases, peft_table
from lorax.interop.factors import Module
from lorax.interop.peft_base import WEIGHT, Base
from lorax.types import Adapters

KINDS = ("lora", "dora", "adalora")
"""Parametrisations written besides those of `peft_table`, by their names."""


def untied(
    modules: list[Module], saved: dict[str, np.ndarray], base: Base
) -> tuple[list[Module], dict[str, np.ndarray]]:
    """Drops a tied head's copy of its embedding; ValueError if the two differ."""
    if not base.head:
        return modules, saved
    pair = {m.name: m for m in modules if m.name in (base.embedding, base.head)}
    whole = [n + WEIGHT for n in (base.embedding, base.head) if n + WEIGHT in saved]
    wrong = (
        "PEFT adapts the embedding and its tied head separately, but here they are one "
        "leaf; load the base with tied=False and set its head/kernel to the transposed "
        "embedding"
    )
    if pair:
        if len(pair) < 2 or any(m.cls is not Lora for m in pair.values()):
            raise ValueError(f"factors for {next(iter(pair))!r}: {wrong}")
        one, two = pair[base.head], factors.mirrored(pair[base.embedding], base.head)
        same = all(np.array_equal(one.fields[f], two.fields[f]) for f in ("a", "b"))
        if not same or one.scale != two.scale:
            raise ValueError(f"factors for {base.head!r}: {wrong}")
    if whole:
        if len(whole) < 2 or not np.array_equal(saved[whole[0]], saved[whole[1]]):
            raise ValueError(f"modules_to_save has {whole[0]!r}: {wrong}")
        del saved[base.head + WEIGHT]
    return [m for m in modules if m.name != base.head], saved


def kind_of(adapters: Adapters) -> str:
    """Returns the registered name of the class that all adapters share."""
    kinds = {type(a): path for path, a in adapters.items() if not a.replaces}
    if len(kinds) > 1:
        raise ValueError(
            "a PEFT adapter has one parametrisation, but these have several: "
            + ", ".join(f"{c.__name__} at {path!r}" for c, path in kinds.items())
            + "; save them separately, or convert AdaLora to Lora with compose.to_lora"
        )
    if not kinds:
        raise ValueError(
            "no low-rank adapters: PEFT has no form for Full adapters only"
        )
    cls, path = next(iter(kinds.items()))
    name = adapter_classes.name_of(cls)
    if name not in (*KINDS, *peft_table.FORMS):
        raise ValueError(
            f"{path}: PEFT's files have no form for {cls.__name__}; merge it "
            "(lorax.merge) and save the model, or extract a Lora from that "
            "(compose.extract)"
        )
    return name


def split(adapters: Adapters, base: Base) -> tuple[list[Module], dict[str, np.ndarray]]:
    """The modules and full tensors that represent the adapters on disk."""
    keys: dict[str, list[str]] = {}
    for key, location in base.where.items():
        keys.setdefault(location.path, []).append(key)
    modules, saved = [], {}
    for path, adapter in sorted(adapters.items()):
        base.require_one(keys[path][0].removesuffix(WEIGHT))
        if adapter.replaces:
            (value,) = jax.tree.leaves(adapter)
            leaves = {path: np.asarray(jax.device_get(value))}
            for key in keys[path]:
                saved[key] = base.tensor(key, leaves)
            continue
        base.require_matrix(keys[path][0].removesuffix(WEIGHT))
        lora: Any = adapter
        entry, stacked = base.where[keys[path][0]].entry, len(lora.axes.batch) > 0
        want = factors.axes_of(entry, stacked)
        if lora.axes != want or not entry.inputs:
            raise ValueError(
                f"{path}: on disk, factors of this leaf have {want}, but the adapter "
                f"has {lora.axes}"
            )
        chosen = range(len(keys[path])) if lora.layers is None else lora.layers
        names = [keys[path][layer].removesuffix(WEIGHT) for layer in chosen]
        modules += factors.split(lora, names)
    _check_whole(saved, base)
    return _with_head(modules, saved, base)


def _check_whole(saved: Collection[str], base: Base) -> None:
    """PEFT saves a module in full or adapts it, training its bias or not."""
    alone = peft_biases.lone(saved, base)
    whole = {key.rpartition(".")[0] for key in saved if key not in alone}
    for key in base.where:
        parts = [key[:i] for i, letter in enumerate(key) if letter == "."]
        if key not in saved and (module := whole.intersection(parts)):
            raise ValueError(
                f"part of {min(module)!r} is Full, but PEFT saves whole modules: "
                f"make {base.where[key].path!r} Full too, not another adapter"
            )


def _with_head(
    modules: list[Module], saved: dict[str, np.ndarray], base: Base
) -> tuple[list[Module], dict[str, np.ndarray]]:
    """Repeats the embedding's entries for its tied head."""
    embedding = base.embedding + WEIGHT
    if base.head and embedding in saved:
        saved[base.head + WEIGHT] = saved[embedding].copy()
    for module in [m for m in modules if base.head and m.name == base.embedding]:
        if module.cls is not Lora:
            own = "DoRA" if "magnitude" in module.fields else module.cls.__name__
            raise ValueError(
                f"{module.name!r} is embedding and head in one, with different "
                f"outputs: PEFT has no {own} for both"
            )
        modules.append(factors.mirrored(module, base.head))
    return modules, saved
