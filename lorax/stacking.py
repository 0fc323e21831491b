"""Adapters of several members as one tree: a leading axis, ranks padded by zeros."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lorax.adapters import layout, ranks
from lorax.types import Adapters, PairStatics


def stack(members: Sequence[Adapters]) -> tuple[Adapters, dict[str, PairStatics]]:
    """Returns adapters of leaves `[K, ...]`, and the statics in which they differ.

    Args:
      members: K adapter trees of one parameter tree, at least one.

    Returns:
      The stacked adapters, narrower factors padded with zeros to the widest, every
      static field that of the first member; and for the paths where scales or ranks
      differ, `PairStatics` of arrays `[K]`.

    Raises:
      ValueError: members that differ in more; the message names path and field.
    """
    stacked: Adapters = {}
    pairs: dict[str, PairStatics] = {}
    for k, adapters in enumerate(members):
        if paths := sorted(members[0].keys() ^ adapters.keys()):
            has, lacks = (k, 0) if paths[0] in adapters else (0, k)
            raise ValueError(
                f"{paths[0]}: member {has} has an adapter there and member {lacks} has "
                "none; members must adapt the same leaves"
            )
    for path in members[0]:
        own: list[Any] = [adapters[path] for adapters in members]
        for k, adapter in enumerate(own):
            _require_alike(path, k, adapter, own[0])
        if hasattr(own[0], "scale"):
            widths = [getattr(a, "rank", 1) for a in own]  # 1: it has none
            scales = [a.scale for a in own]
            if len({*widths}) > 1 or len({*scales}) > 1:
                dtype = layout.wide(*jax.tree.leaves(own[0]))
                pairs[path] = PairStatics(
                    jnp.array(scales, dtype), jnp.array(widths, jnp.int32)
                )
                if len({*widths}) > 1:
                    own = [ranks.padded(a, max(widths)) for a in own]
                own = [a.replace(scale=scales[0]) for a in own]  # one treedef
        stacked[path] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)
    return stacked, pairs


def _require_alike(path: str, k: int, adapter: Any, first: Any) -> None:
    """Raises ValueError naming the first field in which two members cannot be stacked.

    Shapes are those of one leaf, which `transform.check` has compared, up to the rank.
    """
    fields = [field.name for field in dataclasses.fields(first)]
    pairs: dict[str, tuple[Any, Any]] = {"class": (type(adapter), type(first))}
    if type(adapter) is type(first):
        for name in fields:
            new, old = getattr(adapter, name), getattr(first, name)
            if name in first.roles:
                pairs[f"{name}.dtype"] = new.dtype, old.dtype
            elif name != "scale":
                pairs[name] = new, old
        if not first.padded or first.counts_ranks:  # the padding would be seen
            for name in first.roles:
                new, old = getattr(adapter, name), getattr(first, name)
                pairs[f"{name}.shape"] = new.shape, old.shape
    for name, (new, old) in pairs.items():
        if new != old:
            raise ValueError(
                f"{path}: member {k} has {name}={new!r} and member 0 has {old!r}; "
                "members of a population differ in key, rank (not of AdaLora), scale "
                "and hyperparameters alone: train this one in another population"
            )
