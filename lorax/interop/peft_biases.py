"""Biases trained along with PEFT's factors: `bias` and `lora_bias` of its config.

bias="lora_only"   <module>.base_layer.bias of every adapted module
bias="all"         these, and <module>.bias of every other module
lora_bias=True     <module>.lora_B.bias: y = W x + bias + s (B A x + b)

Here a bias is a leaf of its own, and a trained one is Full. What lora_bias adds is
folded into it when loading, as `bias + s b`; the function is the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from lorax.interop import files
from lorax.interop.peft_base import Base
from lorax.interop.peft_names import Names
from lorax.interop.peft_selection import PREFIX, Selection

BIAS, FROZEN = ".bias", ".base_layer.bias"


def renamed(
    tensors: Mapping[str, files.Tensor], settings: Selection, names: Names
) -> dict[str, files.Tensor]:
    """Returns the tensors, with every trained bias under its plain name.

    Args:
      tensors: by name.
      settings: from the config.
      names: how PEFT names the modules.
    """
    found = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(FROZEN)
        if settings.bias == "none" or not name.endswith(FROZEN):
            found[name] = tensor
        elif not settings.saves(names.of(module)):
            found[module + BIAS] = tensor  # otherwise it is a copy that nothing reads
    return found


def require_all(
    found: Collection[str], settings: Selection, base: Base, names: Names
) -> None:
    """Raises ValueError if the file lacks a bias that, by `bias`, is trained."""
    for key in base.where:
        if key.endswith(BIAS) and trains(key, settings, base, names):
            if key not in found:
                raise ValueError(
                    f"according to bias={settings.bias!r}, {key!r} was trained, but "
                    "the file does not contain it"
                )


def trains(key: str, settings: Selection, base: Base, names: Names) -> bool:
    """True for a bias that is trained along with factors."""
    module = key.removesuffix(BIAS)
    if not key.endswith(BIAS) or not module.startswith(names.lacking):
        return False
    linear = module in base.modules and not base.is_embedding(module)
    return settings.trains_bias(names.of(module), linear)


def folded(
    added: Mapping[str, tuple[float, np.ndarray]],
    saved: Mapping[str, np.ndarray],
    base: Base,
    params: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """Returns the sums of the base's biases and those of `lora_bias`, by key.

    Args:
      added: `{module: (scale, lora_B.bias)}`.
      saved: tensors that the file holds in full.
      base: the model.
      params: leaves by path.

    Raises:
      ValueError: a module has no bias, or there are no parameters.
    """
    found = {}
    for module, (scale, own) in added.items():
        key = module + BIAS
        if key not in base.where:
            raise ValueError(
                f"lora_bias=True: {module!r} has no bias in this base, so there is no "
                "leaf for the one that B adds; load a base whose config has one there "
                "(attention_bias, mlp_bias), filled with zeros, or train with "
                "lora_bias=False"
            )
        if key not in saved and not params:
            raise ValueError(
                "lora_bias=True adds to the base's biases; pass the base's parameters "
                "to peft.load as params="
            )
        before = saved[key] if key in saved else base.tensor(key, params)
        found[key] = np.float32(before) + np.float32(scale) * own
    return found


def lone(saved: Collection[str], base: Base) -> set[str]:
    """Returns the biases that are saved without the rest of their module."""
    modules = {key.rpartition(".")[0] for key in base.where if key not in saved}
    return {
        key for key in saved if key.endswith(BIAS) and key.removesuffix(BIAS) in modules
    }


def mode(
    alone: Collection[str], saved: Collection[str], adapted: Collection[str], base: Base
) -> str:
    """Returns PEFT's `bias` for the trained biases: "none", "lora_only" or "all".

    Args:
      alone: what `lone` returned.
      saved: keys of all tensors saved in full.
      adapted: names of the modules that have factors.
      base: the model.

    Raises:
      ValueError: no value of `bias` describes these.
    """
    if not alone:
        return "none"
    beside = {name + BIAS for name in adapted} & base.where.keys()
    every = {key for key in base.where if key.endswith(BIAS)} - set(saved) | set(alone)
    if set(alone) == beside:
        return "lora_only"
    if set(alone) == every:
        return "all"
    near = beside if set(alone) < beside else every
    own, lacking = (
        sorted({base.where[key].path for key in keys})
        for keys in (set(alone), near - set(alone))
    )
    raise ValueError(
        f"biases are Full at {own}; PEFT trains either the biases of all modules that "
        f"have factors (bias='lora_only') or all biases (bias='all'): make {lacking} "
        "Full too, or no biases"
    )


def on_disk(key: str, adapted: Collection[str]) -> str:
    """Returns the name of a bias in PEFT's file."""
    module = key.removesuffix(BIAS)
    return PREFIX + module + (FROZEN if module in adapted else BIAS)
