"""Biases that train beside PEFT's factors: `bias` and `lora_bias` of its config.

bias="lora_only"   <module>.base_layer.bias, of every module that is adapted
bias="all"         these, and <module>.bias of every other module
lora_bias=True     <module>.lora_B.bias: y = W x + bias + s (B A x + b)

Here a bias is a leaf of its own, and one that trains is Full. What lora_bias adds is
folded into it at loading: `bias + s b`, the same function.
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
    """Returns the tensors with every bias that trains under its own name.

    Args:
      tensors: by their names.
      settings: of the config.
      names: how PEFT names the modules.
    """
    found = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(FROZEN)
        if settings.bias == "none" or not name.endswith(FROZEN):
            found[name] = tensor
        elif not settings.saves(names.of(module)):
            found[module + BIAS] = tensor  # else a copy that nothing reads
    return found


def require_all(
    found: Collection[str], settings: Selection, base: Base, names: Names
) -> None:
    """Raises ValueError for a bias that `bias` says trains and the file lacks."""
    for key in base.where:
        if key.endswith(BIAS) and trains(key, settings, base, names):
            if key not in found:
                raise ValueError(
                    f"bias={settings.bias!r} says that {key!r} trains, and the file "
                    "does not hold it"
                )


def trains(key: str, settings: Selection, base: Base, names: Names) -> bool:
    """True for a bias that trains beside factors."""
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
    """Returns the biases of `lora_bias` by their keys, the base's own in them.

    Args:
      added: `{module: (scale, lora_B.bias)}`.
      saved: tensors of the file that are stored whole.
      base: the model.
      params: leaves by path.

    Raises:
      ValueError: a module without a bias, or no parameters.
    """
    found = {}
    for module, (scale, own) in added.items():
        key = module + BIAS
        if key not in base.where:
            raise ValueError(
                f"lora_bias=True: {module!r} has no bias in this base, so the one that "
                "B adds has no leaf; load a base whose config has one there "
                "(attention_bias, mlp_bias), zeros where it had none, or train "
                "with lora_bias=False"
            )
        if key not in saved and not params:
            raise ValueError(
                "lora_bias=True adds to the base's biases; pass params=, those of the "
                "base, to peft.load"
            )
        before = saved[key] if key in saved else base.tensor(key, params)
        found[key] = np.float32(before) + np.float32(scale) * own
    return found


def lone(saved: Collection[str], base: Base) -> set[str]:
    """Returns the biases that are stored whole where the rest of the module is not."""
    modules = {key.rpartition(".")[0] for key in base.where if key not in saved}
    return {
        key for key in saved if key.endswith(BIAS) and key.removesuffix(BIAS) in modules
    }


def mode(
    alone: Collection[str], saved: Collection[str], adapted: Collection[str], base: Base
) -> str:
    """Returns PEFT's word for the biases that train: "none", "lora_only" or "all".

    Args:
      alone: what `lone` returned.
      saved: keys of all whole tensors.
      adapted: names of the modules that have factors.
      base: the model.

    Raises:
      ValueError: PEFT has no word for these.
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
        f"biases are Full at {own}; PEFT trains those of every module that has factors "
        f"(bias='lora_only') or all of them (bias='all'): make {lacking} Full too, or "
        "none of them"
    )


def on_disk(key: str, adapted: Collection[str]) -> str:
    """Returns the name of a bias in PEFT's file."""
    module = key.removesuffix(BIAS)
    return PREFIX + module + (FROZEN if module in adapted else BIAS)
