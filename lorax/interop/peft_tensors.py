"""The tensors of PEFT's `adapter_model.safetensors`: their names, roles and shapes.

base_model.model.<module>.lora_A.weight        [rank, in]     LoRA, DoRA
base_model.model.<module>.lora_B.weight        [out, rank]
base_model.model.<module>.lora_embedding_A     [rank, rows]   of an embedding
base_model.model.<module>.lora_embedding_B     [width, rank]
base_model.model.<module>.lora_magnitude_vector  [out]        DoRA
base_model.model.<module>.lora_A, .lora_B      as above       AdaLoRA
base_model.model.<module>.lora_E               [rank, 1]
base_model.model.<module>.weight, .bias        modules_to_save
base_model.model.<module>.base_layer.weight    the frozen weight of an embedding
base_model.model.<module>.token_adapter...     rows of an embedding: see `peft_rows`
base_model.model.<module>.base_layer.bias      a trained bias: see `peft_biases`

`peft_names` converts the other spellings found in files to this form.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lorax import tree
from lorax.interop import (
    files,
    peft_biases,
    peft_names,
    peft_parameters,
    peft_rows,
    peft_table,
)
from lorax.interop.factors import Module
from lorax.interop.peft_base import WEIGHT, Base
from lorax.interop.peft_config import B_BIAS, FormSettings, Settings, suffixes
from lorax.interop.peft_forms import Place, Shapes
from lorax.interop.peft_selection import PREFIX
from lorax.types import Adapters

FROZEN = ".base_layer."

Parts = dict[str, dict[str, files.Tensor]]
Tensors = dict[str, files.Tensor]


class Read(NamedTuple):
    """What a file holds.

    Attributes:
      modules: with their arrays.
      saved: tensors that are saved in full, by key.
      made: adapters of rows of embeddings, and of experts' kernels, by path.
      frozen: arrays for `Base.frozen`, by name.
    """

    modules: list[Module]
    saved: dict[str, np.ndarray]
    made: Adapters
    frozen: dict[str, np.ndarray]


def read(
    tensors: Mapping[str, files.Tensor],
    settings: Settings | FormSettings,
    base: Base,
    params: Mapping[str, Any],
) -> Read:
    """Returns the arrays of every module, and the tensors that are saved in full.

    Every name and shape is checked before anything is read.

    Args:
      tensors: of the file.
      settings: of the config that goes with it.
      base: the model.
      params: leaves by path, with which frozen weights in the file are compared; if
        empty, they are not.

    Raises:
      ValueError: names or shapes are not those that the config and the base require.
    """
    tensors, common = _shared(tensors, settings)
    named, names = peft_names.read(tensors, settings.suffixes, base)
    named = peft_biases.renamed(named, settings, names)
    tokens, named = _tokens(named)
    experts, named = peft_parameters.taken(named, base)
    parts, rest = _sorted(named, settings.suffixes)
    places = {
        module: place_of(module, settings.given(names.of(module)), base, params)
        for module in parts
        if module in base.modules
    }
    _check_modules(parts, places, settings, base, names)
    _check_rest(rest, settings, base, names)
    for module, own in parts.items():
        asks = settings.asks(names.of(module))
        _check_shapes(own, settings.shapes(places[module]), asks)
    _check_frozen(rest, base, params)
    frozen = _frozen(common, settings, list(places.values()))
    rows = peft_rows.modules(settings, base, names)
    made = peft_rows.read(tokens, rows, base, params)
    if experts or settings.parameters:
        made |= peft_parameters.read(experts, settings, base, names)
    modules, biases = [], {}
    for module, own in parts.items():
        arrays = {end: _float32(t) for end, t in own.items()}
        modules.append(settings.module(arrays, places[module]))
        if settings.lora_bias:
            biases[module] = modules[-1].scale, arrays[B_BIAS]
    saved = {k: tensor.read() for k, tensor in rest.items() if FROZEN not in k}
    saved |= peft_biases.folded(biases, saved, base, params)
    return Read(modules, saved, made, frozen)


def _tokens(named: Tensors) -> tuple[Tensors, Tensors]:
    """Returns the tensors of embedding rows by module, and the others by name."""
    own = {n: t for n, t in named.items() if n.endswith(peft_rows.ALONE)}
    found = {peft_rows.module_of(name): tensor for name, tensor in own.items()}
    return found, {name: t for name, t in named.items() if name not in own}


def _shared(
    tensors: Mapping[str, files.Tensor], settings: Settings | FormSettings
) -> tuple[Tensors, Tensors]:
    """Separates the tensors that all modules share; returns the rest, and them.

    A file may hold them once, or repeat them for every module (as RandLoRA's do).
    """
    names = settings.common.names if settings.common else ()
    rest: Tensors = {}
    found: Tensors = {}
    for key, tensor in tensors.items():
        name = next((part for part in key.split(".") if part in names), None)
        if name is None:
            rest[key] = tensor
            continue
        first = found.setdefault(name, tensor)
        same = first.shape == tensor.shape
        if first is not tensor and not (
            same and np.array_equal(first.read(), tensor.read())
        ):
            raise ValueError(
                f"{first.key!r} and {key!r} differ, but all modules share one {name}"
            )
    return rest, found


def _frozen(
    found: Tensors, settings: Settings | FormSettings, places: Sequence[Place]
) -> dict[str, np.ndarray]:
    """The shared tensors as arrays for `Base.frozen`."""
    if (common := settings.common) is None:
        return {}
    tree.require(common.names, found, "file")
    asks = "the largest adapted modules"
    _check_shapes(found, common.shapes(places), asks)
    return common.load({name: _float32(tensor) for name, tensor in found.items()})


def place_of(
    module: str, given: Mapping[str, Any], base: Base, params: Mapping[str, Any]
) -> Place:
    """Returns what a form needs to know of a module.

    Args:
      module: its name.
      given: the config's values for it.
      base: the model.
      params: leaves by path; if empty, the kernel is not known.
    """
    in_, out = base.sizes(module)
    path, layer, _ = base.modules[module]

    def kernel() -> np.ndarray:
        leaf = params[path] if layer is None else params[path][layer]
        return np.asarray(jax.device_get(leaf), np.float32).reshape(in_, out)

    known = kernel if path in params else None
    bias = f"{module}.bias" in base.where
    return Place(module, in_, out, given, known, base.is_embedding(module), bias)


def _float32(tensor: files.Tensor) -> np.ndarray:
    return tensor.read().astype(np.float32)


def _sorted(named: Tensors, suffixes: Collection[str]) -> tuple[Parts, Tensors]:
    """Returns `{module: {suffix: tensor}}`, and the other tensors."""
    parts: Parts = {}
    rest = {}
    for name, tensor in named.items():
        end = next((end for end in suffixes if name.endswith(end)), None)
        if end is None:
            rest[name] = tensor
        else:
            parts.setdefault(name.removesuffix(end), {})[end] = tensor
    return parts, rest


def _check_modules(
    parts: Parts,
    places: Mapping[str, Place],
    settings: Settings | FormSettings,
    base: Base,
    names: peft_names.Names,
) -> None:
    """Checks the modules that have factors against the base and the config."""
    for module, own in parts.items():
        base.require_matrix(module)
        if module not in base.modules:
            key = next(iter(own.values())).key
            raise ValueError(f"{key!r}: {_unknown(module, base.modules)}")
        base.require_one(module)
        settings.require(module, base)
        ends = set(settings.shapes(places[module]))
        if odd := sorted(ends ^ set(own)):
            there, tensor = next(iter(own.items()))
            raise ValueError(
                f"{tensor.key.removesuffix(there) + odd[0]!r} is "
                f"{'present' if odd[0] in own else 'absent'}: as a module of this base "
                f"in {settings.said}, {module!r} needs "
                f"{sorted(ends)}"
            )
    want = {
        module
        for module in base.modules
        if module.startswith(names.lacking)
        and settings.selects(
            names.of(module),
            linear=not base.is_embedding(module) and module != base.head,
        )
    }
    tied = {base.embedding, base.head} - {""}
    if settings.tying and want & tied:
        want |= tied
    if missing := sorted(want - set(parts)):
        raise ValueError(
            f"no factors for {missing[0]!r} ({len(missing)} such modules), which "
            "target_modules selects; the file is incomplete"
        )
    if extra := sorted(set(parts) - want):
        raise ValueError(
            f"factors for {extra[0]!r} ({len(extra)} such modules), which "
            "target_modules, exclude_modules, layers_to_transform and layers_pattern "
            "do not select: PEFT would ignore them"
        )


def _check_rest(
    rest: Tensors,
    settings: Settings | FormSettings,
    base: Base,
    names: peft_names.Names,
) -> None:
    """Checks tensors saved in full, and frozen weights, against base and config."""
    shapes = {key: base.shape(key) for key in base.where}
    if base.head:
        shapes[base.head + WEIGHT] = shapes[base.embedding + WEIGHT]
    for name, tensor in rest.items():
        key = name.replace(FROZEN, ".")
        if key not in shapes:
            raise ValueError(f"{tensor.key!r}: {_unknown(key, shapes)}")
        if tensor.shape != shapes[key]:
            raise ValueError(_misshapen(tensor, shapes[key], "the base requires"))
        tensor.require_floating()
        base.require_one(key.rpartition(".")[0])
        module = names.of(key.rpartition(".")[0])
        tied = settings.tying and key == f"{base.head}{WEIGHT}"
        bias = peft_biases.trains(key, settings, base, names)
        frozen = FROZEN in name and not key.endswith(".bias")
        if not frozen and not (settings.saves(module) or tied or bias):
            raise ValueError(
                f"{tensor.key!r}: modules_to_save does not name it"
                + (", nor does bias" if key.endswith(".bias") else "")
            )
    peft_biases.require_all(rest, settings, base, names)
    for key in base.where:
        module = key.rpartition(".")[0]
        own = module.startswith(names.lacking) and settings.saves(names.of(module))
        if own and key not in rest:
            absent = PREFIX + names.of(key)
            raise ValueError(f"modules_to_save names {module!r}; {absent!r} is absent")


def _check_shapes(own: Tensors, want: Shapes, asks: str) -> None:
    for end, tensor in own.items():
        if tensor.shape != tuple(want[end]):
            raise ValueError(
                _misshapen(tensor, want[end], f"{asks} and the base require")
            )
        tensor.require_floating()


def _check_frozen(rest: Tensors, base: Base, params: Mapping[str, Any]) -> None:
    """PEFT stores the embeddings that it adapts; they must equal the base's."""
    for name, tensor in rest.items():
        key = name.replace(FROZEN, ".")
        if FROZEN not in name or not params:
            continue
        if key == base.head + WEIGHT:
            key = base.embedding + WEIGHT
        if not np.array_equal(base.tensor(key, params), tensor.read()):
            raise ValueError(
                f"{tensor.key!r} differs from the base's: the adapter was made for "
                "another base, or for one whose embedding was resized"
            )


def to_disk(module: Module, kind: str, place: Place) -> dict[str, np.ndarray]:
    """Returns `{key: tensor}` of a module's arrays.

    Args:
      module: its arrays.
      kind: registered name of its class.
      place: the module.
    """
    if kind in peft_table.FORMS:
        found = peft_table.FORMS[kind].save(module, place)
    else:
        found = {}
        for field, end in suffixes(kind, place.embedding).items():
            array = module.fields[field]
            found[end] = array[:, None] if field == "lam" else array.T
    name = f"{PREFIX}{module.name}"
    return {f"{name}{end}": np.ascontiguousarray(t) for end, t in found.items()}


def common_to_disk(
    modules: Sequence[Module],
    places: Sequence[Place],
    kind: str,
    frozen: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """Returns `{key: tensor}` of the tensors that all modules share.

    Args:
      modules: of one class.
      places: of the modules.
      kind: registered name of their class.
      frozen: arrays of `Base.frozen` by name.

    Raises:
      ValueError: an array is missing.
    """
    form = peft_table.FORMS.get(kind)
    if form is None or form.common is None:
        return {}
    lent = {name for m in modules for _, name in m.statics["lent"]}
    if lacking := sorted(lent - set(frozen)):
        raise ValueError(
            f"{form.peft_type} is written with its frozen arrays {lacking}; pass the "
            "lorax.Base that lorax.init returned as params="
        )
    arrays = {name: np.asarray(jax.device_get(frozen[name])) for name in lent}
    found = form.common.save(modules, places, arrays)
    fronts = ["base_model."]
    if form.common.repeated:
        fronts += [f"{PREFIX}{module.name}." for module in modules]
    return {
        f"{front}{name}": np.ascontiguousarray(tensor)
        for name, tensor in found.items()
        for front in fronts
    }


def _misshapen(tensor: files.Tensor, want: tuple[int, ...], who: str) -> str:
    return (
        f"{tensor.key!r} has shape {list(tensor.shape)}, but {who} {list(want)}; "
        "is the adapter for another base?"
    )


def _unknown(name: str, known: Any) -> str:
    told = f"the base model has no {name!r}"
    if "head" in name:
        told += (
            " (with tied=True its head is the embedding and has no adapter of its own)"
        )
    return f"{told}; is the adapter for another base? {tree.nearest(name, known)}"
