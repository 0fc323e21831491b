"""The tensors of PEFT's `adapter_model.safetensors`: which is what, and their shapes.

base_model.model.<module>.lora_A.weight        [rank, in]     LoRA, DoRA
base_model.model.<module>.lora_B.weight        [out, rank]
base_model.model.<module>.lora_embedding_A     [rank, rows]   of an embedding
base_model.model.<module>.lora_embedding_B     [width, rank]
base_model.model.<module>.lora_magnitude_vector  [out]        DoRA
base_model.model.<module>.lora_A, .lora_B      as above       AdaLoRA
base_model.model.<module>.lora_E               [rank, 1]
base_model.model.<module>.weight, .bias        modules_to_save
base_model.model.<module>.base_layer.weight    the frozen weight of an embedding

`peft_names` brings the other spellings that are found into this form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lorax import tree
from lorax.interop import files, peft_names
from lorax.interop.factors import Module
from lorax.interop.peft_base import WEIGHT, Base
from lorax.interop.peft_config import PREFIX, Settings

LORA = {"a": ".lora_A.weight", "b": ".lora_B.weight"}
EMBEDDING = {"a": ".lora_embedding_A", "b": ".lora_embedding_B"}
ADALORA = {"a": ".lora_A", "b": ".lora_B", "lam": ".lora_E"}
MAGNITUDE = {"magnitude": ".lora_magnitude_vector"}
FROZEN = ".base_layer."

Parts = dict[str, dict[str, files.Tensor]]
Tensors = dict[str, files.Tensor]


def suffixes(kind: str, embedding: bool) -> dict[str, str]:
    """Returns what follows a module's name, by field of `factors.Module`.

    Args:
      kind: "lora", "dora" or "adalora".
      embedding: the module is a lookup table.
    """
    if kind == "adalora":
        return ADALORA
    return (EMBEDDING if embedding else LORA) | (MAGNITUDE if kind == "dora" else {})


def read(
    tensors: Mapping[str, files.Tensor],
    settings: Settings,
    base: Base,
    params: Mapping[str, Any],
) -> tuple[list[Module], dict[str, np.ndarray]]:
    """Returns the factors of every module, and the tensors that are stored whole.

    Nothing is read before every name and shape has been checked.

    Args:
      tensors: of the file.
      settings: of the config beside it.
      base: the model.
      params: leaves by path, against which a frozen weight in the file is held; empty:
        it is not.

    Raises:
      ValueError: names or shapes that are not what the config and the base ask for.
    """
    named, front = peft_names.read(tensors, settings.kind, base)
    parts, rest = _sorted(named, settings.kind)
    _check_modules(parts, settings, base, front)
    _check_rest(rest, settings, base, front)
    scales = {}
    for module, own in parts.items():
        _check_shapes(module, own, settings.kept(module.removeprefix(front)), base)
        scales[module] = settings.scale(module.removeprefix(front))
    _check_frozen(rest, base, params)
    modules = [_module(name, own, scales[name]) for name, own in parts.items()]
    saved = {k: tensor.read() for k, tensor in rest.items() if FROZEN not in k}
    return modules, saved


def _sorted(named: Tensors, kind: str) -> tuple[Parts, Tensors]:
    """Returns `{module: {suffix: tensor}}`, and the other tensors."""
    ends = {*suffixes(kind, True).values(), *suffixes(kind, False).values()}
    parts: Parts = {}
    rest = {}
    for name, tensor in named.items():
        end = next((end for end in ends if name.endswith(end)), None)
        if end is None:
            rest[name] = tensor
        else:
            parts.setdefault(name.removesuffix(end), {})[end] = tensor
    return parts, rest


def _check_modules(parts: Parts, settings: Settings, base: Base, front: str) -> None:
    """Holds the modules that have factors against the base and the config."""
    for module, own in parts.items():
        if module not in base.modules:
            key = next(iter(own.values())).key
            raise ValueError(f"{key!r}: {_unknown(module, base.modules)}")
        base.require_one(module)
        ends = set(suffixes(settings.kind, base.is_embedding(module)).values())
        if odd := sorted(ends ^ set(own)):
            there, tensor = next(iter(own.items()))
            raise ValueError(
                f"{tensor.key.removesuffix(there) + odd[0]!r} is "
                f"{'there' if odd[0] in own else 'absent'}: as a module of this base "
                f"in {settings.kind} form (peft_type, use_dora) {module!r} needs "
                f"{sorted(ends)}"
            )
    want = {
        module
        for module in base.modules
        if module.startswith(front)
        and settings.selects(
            module.removeprefix(front),
            linear=not base.is_embedding(module) and module != base.head,
        )
    }
    tied = {base.embedding, base.head} - {""}
    if settings.tying and want & tied:
        want |= tied
    if missing := sorted(want - set(parts)):
        raise ValueError(
            f"no factors for {missing[0]!r} (of {len(missing)} such modules), which "
            "target_modules selects; the file is not complete"
        )
    if extra := sorted(set(parts) - want):
        raise ValueError(
            f"factors for {extra[0]!r} (of {len(extra)} such modules), which "
            "target_modules, less exclude_modules and with layers_to_transform and "
            "layers_pattern, do not select: PEFT would ignore them"
        )


def _check_rest(rest: Tensors, settings: Settings, base: Base, front: str) -> None:
    """Holds what is stored whole, and frozen weights, against base and config."""
    shapes = {key: base.shape(key) for key in base.where}
    if base.head:
        shapes[base.head + WEIGHT] = shapes[base.embedding + WEIGHT]
    for name, tensor in rest.items():
        key = name.replace(FROZEN, ".")
        if key not in shapes:
            raise ValueError(f"{tensor.key!r}: {_unknown(key, shapes)}")
        if tensor.shape != shapes[key]:
            raise ValueError(_misshapen(tensor, shapes[key], "the base asks"))
        tensor.require_floating()
        base.require_one(key.rpartition(".")[0])
        module = key.rpartition(".")[0].removeprefix(front)
        tied = settings.tying and key == f"{base.head}{WEIGHT}"
        if FROZEN not in name and not settings.saves(module) and not tied:
            raise ValueError(f"{tensor.key!r}: modules_to_save does not name it")
    for key in base.where:
        module = key.rpartition(".")[0]
        own = module.startswith(front) and settings.saves(module.removeprefix(front))
        if own and key not in rest:
            absent = PREFIX + key.removeprefix(front)
            raise ValueError(f"modules_to_save names {module!r}; {absent!r} is absent")


def _check_shapes(module: str, own: Tensors, rank: int, base: Base) -> None:
    in_, out = base.sizes(module)
    shapes = {"A": (rank, in_), "B": (out, rank), "E": (rank, 1), "vector": (out,)}
    for end, tensor in own.items():
        want = shapes[end.removesuffix(WEIGHT).rpartition("_")[2]]
        if tensor.shape != want:
            who = f"rank {rank} (by r and rank_pattern, or init_r) and the base ask"
            raise ValueError(_misshapen(tensor, want, who))
        tensor.require_floating()


def _check_frozen(rest: Tensors, base: Base, params: Mapping[str, Any]) -> None:
    """PEFT stores embeddings that it adapts; they must be the base's."""
    for name, tensor in rest.items():
        key = name.replace(FROZEN, ".")
        if FROZEN not in name or not params:
            continue
        if key == base.head + WEIGHT:
            key = base.embedding + WEIGHT
        if not np.array_equal(base.tensor(key, params), tensor.read()):
            raise ValueError(
                f"{tensor.key!r} is not the base's: the adapter was made for another "
                "base, or one whose embedding was resized"
            )


def _module(name: str, own: Tensors, scale: float) -> Module:
    fields: dict[str, np.ndarray] = {}
    for end, tensor in own.items():
        array = tensor.read().astype(np.float32)
        if end in MAGNITUDE.values():
            fields["magnitude"] = array
        elif end == ADALORA["lam"]:
            fields["lam"] = array[:, 0]
        else:
            fields["a" if "A" in end else "b"] = array.T
    return Module(name, scale=scale, **fields)


def to_disk(module: Module, kind: str, embedding: bool) -> dict[str, np.ndarray]:
    """Returns `{key: tensor}` of a module's factors.

    Args:
      module: its factors.
      kind: "lora", "dora" or "adalora".
      embedding: it is a lookup table.
    """
    found = {}
    for part, suffix in suffixes(kind, embedding).items():
        array = getattr(module, part)
        tensor = array[:, None] if part == "lam" else array.T
        found[f"{PREFIX}{module.name}{suffix}"] = np.ascontiguousarray(tensor)
    return found


def _misshapen(tensor: files.Tensor, want: tuple[int, ...], who: str) -> str:
    return (
        f"{tensor.key!r} has shape {list(tensor.shape)}, and {who} for {list(want)}; "
        "is the adapter for another base?"
    )


def _unknown(name: str, known: Any) -> str:
    told = f"the base model has no {name!r}"
    if "head" in name:
        told += (
            " (with tied=True its head is the embedding, with no adapter of its own)"
        )
    return f"{told}; is the adapter for another base? {tree.nearest(name, known)}"
