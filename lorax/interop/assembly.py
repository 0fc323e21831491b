"""Assembles adapters of leaves from the modules and full tensors of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from lorax.adapters import Full
from lorax.interop import factors
from lorax.interop.factors import Module
from lorax.interop.peft_base import Base
from lorax.models import table
from lorax.types import Adapters


def adapters(
    modules: Sequence[Module],
    saved: Mapping[str, np.ndarray],
    base: Base,
    dropout: float = 0.0,
) -> Adapters:
    """Returns adapters by path.

    Args:
      modules: with their arrays; those of rank 0 are left out.
      saved: `{key on disk: tensor}` of parameters that are stored in full.
      base: the model.
      dropout: on the input of every adapter except an embedding's.

    Raises:
      ValueError: only some layers of a parameter that is one leaf here are stored.
    """
    groups: dict[str, list[tuple[int | None, Module]]] = {}
    for module in modules:
        if not module.empty:
            path, layer, _ = base.modules[module.name]
            groups.setdefault(path, []).append((layer, module))
    found: Adapters = {}
    for path, group in groups.items():
        name = group[0][1].name
        rate = 0.0 if base.is_embedding(name) else dropout
        shape = base.shapes[path].shape
        found[path] = factors.joined(group, base.modules[name].entry, shape, rate)
    return dict(sorted({**found, **_full(saved, base)}.items()))


def _full(saved: Mapping[str, np.ndarray], base: Base) -> Adapters:
    """The leaves that are stored in full; a stack must have all of its layers."""
    groups: dict[str, dict[int | None, np.ndarray]] = {}
    for key, tensor in saved.items():
        place = base.where[key]
        shape = place.own(base.shapes[place.path].shape)
        leaf = table.from_disk(tensor, shape, place.entry).astype(np.float32)
        groups.setdefault(place.path, {})[place.layer] = leaf
    found: Adapters = {}
    for path, parts in groups.items():
        if None in parts:
            found[path] = Full(jnp.asarray(parts[None]))
            continue
        depth = base.shapes[path].shape[0]
        if len(parts) < depth:
            raise ValueError(
                f"modules_to_save has {len(parts)} of the {depth} layers of "
                f"{path!r}, which is one leaf here; load the base with scan=False"
            )
        found[path] = Full(jnp.stack([parts[layer] for layer in range(depth)]))
    return found
