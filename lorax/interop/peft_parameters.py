"""Reads and writes PEFT's `target_parameters`: the kernels of a layer's experts.

<experts>.lora_A.weight              [rank * experts, in]    experts slowest
<experts>.lora_B.weight              [out, rank * experts]   experts fastest
<experts>.base_layer.lora_A.weight   of the parameter before the last, and so on

In torch the kernels are parameters of one module, `[experts, out, in]` (Mixtral, Qwen3)
or `[experts, in, out]` (GPT-OSS), and PEFT wraps the module once for every parameter
that it adapts, so the last one is outermost. In either layout A is on the input side
and B on the output side. Here one adapter holds a pair for each expert,
`a: [*stack, experts, in, rank]`. A router is a parameter too, with one pair under the
usual names of a module.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax.adapters import Lora
from lorax.interop import factors, files
from lorax.interop.factors import Module
from lorax.interop.peft_base import WEIGHT, Base
from lorax.interop.peft_names import Names
from lorax.interop.peft_selection import PREFIX, Selection
from lorax.models import table
from lorax.types import Adapters, Axes

INSIDE = "base_layer."
A, B = "lora_A.weight", "lora_B.weight"


def fronts(chosen: Sequence[str]) -> dict[str, str]:
    """Returns the prefix of `lora_A` for each adapted parameter.

    Args:
      chosen: keys of parameters; those of one module in the module's order.

    Example:
      >>> fronts(["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
      {'mlp.experts.gate_up_proj': 'mlp.experts.base_layer.', \
'mlp.experts.down_proj': 'mlp.experts.'}
    """
    found: dict[str, str] = {}
    for key in chosen:
        module = key.rpartition(".")[0]
        later = [k for k in chosen if k.rpartition(".")[0] == module and k not in found]
        found[key] = f"{module}." + INSIDE * (len(later) - 1)
    return found


def taken(
    named: Mapping[str, files.Tensor], base: Base
) -> tuple[dict[str, files.Tensor], dict[str, files.Tensor]]:
    """Returns the tensors of experts' parameters, and the others."""
    modules = {key.rpartition(".")[0] for key in base.parameters}
    own = {
        name: tensor
        for name, tensor in named.items()
        if name.rpartition(".lora_")[0].split("." + INSIDE[:-1])[0] in modules
    }
    return own, {name: t for name, t in named.items() if name not in own}


def read(
    tensors: Mapping[str, files.Tensor], settings: Selection, base: Base, names: Names
) -> Adapters:
    """Returns the adapters of experts' kernels, by path.

    Args:
      tensors: of these parameters, by name.
      settings: from the config, for plain LoRA.
      base: the model.
      names: how PEFT names the modules.

    Raises:
      ValueError: tensors are missing, left over or misshapen.
    """
    chosen = [key for key in base.parameters if settings.adapts(names.of(key))]
    if unknown := [
        name
        for name in settings.parameters
        if not any(_is(name, names.of(key)) for key in base.where)
    ]:
        raise ValueError(
            f"target_parameters names {unknown[0]!r}, but the base has no such "
            f"parameter; its experts have {sorted({*base.parameters})[:4]}"
        )
    where = fronts(chosen)
    want = {front + end for front in where.values() for end in (A, B)}
    if odd := sorted(want ^ tensors.keys()):
        raise ValueError(
            f"{odd[0]!r} is {'present' if odd[0] in tensors else 'absent'}, but "
            f"target_parameters={list(settings.parameters)} requires it"
            if odd[0] in want
            else f"{odd[0]!r}: target_parameters does not name its parameter"
        )
    pairs = {}
    for key, front in where.items():
        given = settings.given(names.of(key))  # type: ignore[attr-defined]
        pairs[key] = _experts(key, front, given, tensors, base)
    return _adapters(pairs, base)


def _is(name: str, key: str) -> bool:
    return key == name or key.endswith(f".{name}")


def _experts(
    key: str,
    front: str,
    given: Mapping[str, Any],
    tensors: Mapping[str, files.Tensor],
    base: Base,
) -> list[Module]:
    """The experts' pairs for one parameter, as one module each."""
    count, in_, out = _sizes(key, base)
    rank = given["rank"]
    shapes = {A: (rank * count, in_), B: (out, rank * count)}
    arrays = {}
    for end, shape in shapes.items():
        tensor = tensors[front + end]
        if tensor.shape != shape:
            raise ValueError(
                f"{tensor.key!r} has shape {list(tensor.shape)}, but rank {rank} with "
                f"{count} experts requires {list(shape)}; is the adapter for another "
                "base?"
            )
        tensor.require_floating()
        arrays[end] = tensor.read().astype(np.float32)
    a = arrays[A].reshape(count, rank, in_).transpose(0, 2, 1)
    b = arrays[B].reshape(out, rank, count).transpose(2, 1, 0)
    scale = {"scale": given["scale"]}
    return [
        Module(key, Lora, {"a": own_a, "b": own_b}, scale)
        for own_a, own_b in zip(a, b, strict=True)
    ]


def _sizes(key: str, base: Base) -> tuple[int, int, int]:
    """The numbers of experts, inputs and outputs of a parameter."""
    place = base.where[key]
    shape = place.own(base.shapes[place.path].shape)
    return shape[0], shape[1], math.prod(shape[2:])


def _outputs(entry: table.Entry) -> tuple[int, ...]:
    """The output axes of one layer of the leaf, in their order on disk."""
    groups = [own if isinstance(own, tuple) else (own,) for own in entry.order or ()]
    return next(own for own in groups if own not in ((0,), (1,)))


def _adapters(pairs: Mapping[str, list[Module]], base: Base) -> Adapters:
    groups: dict[str, list[str]] = {}
    for key in pairs:
        groups.setdefault(base.where[key].path, []).append(key)
    found: Adapters = {}
    for path, keys in groups.items():
        layers = tuple(
            layer for k in keys if (layer := base.where[k].layer) is not None
        )
        each = factors.alike([module for key in keys for module in pairs[key]])
        entry, shape = base.where[keys[0]].entry, base.shapes[path].shape
        axes = axes_of(entry, stacked=bool(layers))
        count = len(pairs[keys[0]])
        stack = (len(layers), count) if layers else (count,)
        in_, out, _ = axes.sizes(shape)
        order = _outputs(entry)
        a = np.stack([m.fields["a"] for m in each])
        b = np.stack([m.fields["b"] for m in each])
        sizes = [shape[axis + len(layers and (0,))] for axis in order]
        b = b.reshape(*stack, b.shape[1], *sizes)
        ahead = len(stack) + 1
        turned = [ahead + int(i) for i in np.argsort(order)]
        found[path] = Lora(
            jnp.asarray(a.reshape(*stack, *in_, a.shape[-1])),
            jnp.asarray(b.transpose(*range(ahead), *turned)),
            each[0].scale,
            axes,
            layers=None if not layers or len(layers) == shape[0] else layers,
        )
    return found


def axes_of(entry: table.Entry, stacked: bool) -> Axes:
    """Returns the axes of a leaf of experts; if `stacked`, axis 0 is the layers'."""
    first = int(stacked)
    ndim = first + len(entry.axes)
    batch = tuple(range(first + 1))
    return Axes((first + 1,), tuple(range(first + 2, ndim)), batch)


@dataclasses.dataclass(frozen=True)
class Written:
    """What a file holds for experts' kernels.

    Attributes:
      tensors: by key.
      modules: one for each parameter, with its rank and scale.
    """

    tensors: dict[str, np.ndarray]
    modules: list[Module]


def write(adapters: Mapping[str, Any], base: Base) -> Written:
    """Returns the tensors of adapters of experts' kernels.

    Args:
      adapters: by path, plain Lora.
      base: the model.

    Raises:
      ValueError: an adapter does not have a pair for each expert, or has dropout.
    """
    pairs: dict[str, list[Module]] = {}
    for path, adapter in adapters.items():
        keys = [key for key in base.parameters if base.where[key].path == path]
        pairs |= _written(path, adapter, keys, base)
    tensors = {}
    where = fronts([key for key in base.parameters if key in pairs])
    for key, front in where.items():
        a = np.stack([m.fields["a"].T for m in pairs[key]])  # [experts, rank, in]
        b = np.stack([m.fields["b"].T for m in pairs[key]], -1)  # [out, rank, experts]
        tensors[PREFIX + front + A] = a.reshape(-1, a.shape[-1])
        tensors[PREFIX + front + B] = np.ascontiguousarray(b.reshape(len(b), -1))
    return Written(tensors, [pairs[key][0] for key in where])


def _written(
    path: str, adapter: Any, keys: Sequence[str], base: Base
) -> dict[str, list[Module]]:
    """The experts' pairs of one adapter, by parameter, all of one rank in each."""
    place = base.where[keys[0]]
    stacked = place.layer is not None
    want = axes_of(place.entry, stacked)
    if adapter.axes != want:
        raise ValueError(
            f"{path}: PEFT's target_parameters have {want} for this leaf, a pair for "
            f"each expert, but the adapter has {adapter.axes}; merge it (lorax.merge) "
            "and save the model"
        )
    if adapter.dropout:
        raise ValueError(
            f"{path}: PEFT's target_parameters have no dropout, but the adapter has "
            f"dropout={adapter.dropout}; remove it with adapter.replace(dropout=0.0)"
        )
    order = _outputs(place.entry)
    ahead = adapter.b.ndim - len(order)
    turned = [ahead + axis - min(order) for axis in order]
    whole = adapter.replace(b=adapter.b.transpose(*range(ahead), *turned))
    chosen = range(len(keys)) if adapter.layers is None else adapter.layers
    count = _sizes(keys[0], base)[0]
    named = [keys[layer] for layer in chosen for _ in range(count)]
    found: dict[str, list[Module]] = {}
    for module in factors.split(whole, named):
        found.setdefault(module.name, []).append(module)
    return {key: factors.alike(experts) for key, experts in found.items()}


def is_router(module: str, base: Base) -> bool:
    """True for a router: a parameter in torch that looks like a module on disk."""
    return module + WEIGHT in base.where and base.modules[module].path.endswith(
        "router/kernel"
    )
