"""Stacks members as one tree, with padded ranks, and records their scales and ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax.adapters import layout, ranks
from lorax.types import Adapters, PairStatics


class Roster(NamedTuple):
    """The scales and ranks of members where they differ, as Python numbers.

    Attributes:
      paths: paths of the adapters.
      statics: for each path, a `PairStatics` per member.
    """

    paths: tuple[str, ...]
    statics: tuple[tuple[PairStatics, ...], ...]

    def of(self, index: int) -> dict[str, PairStatics]:
        """Returns one member's statics, by path."""
        both = zip(self.paths, self.statics, strict=True)
        return {path: members[index] for path, members in both}

    def saved(self) -> dict[str, dict[str, np.ndarray]]:
        """Returns the arrays `{path: {"scale": float64 [K], "rank": int64 [K]}}`."""
        return {
            path: {
                "scale": np.array([own.scale for own in members], np.float64),
                "rank": np.array([own.rank for own in members], np.int64),
            }
            for path, members in zip(self.paths, self.statics, strict=True)
        }


def read(saved: Mapping[str, Any]) -> Roster:
    """Returns the roster of a saved population.

    Args:
      saved: nested dicts of arrays. Without a "roster", it was written by an older
        lorax, with the bits of the scales in "scale_bits", `{path: uint32 [K, 2]}`.

    Raises:
      ValueError: there is neither "roster" nor "scale_bits".
    """
    if "roster" in saved:
        return _roster({p: _statics(**own) for p, own in saved["roster"].items()})
    if "scale_bits" not in saved:
        raise ValueError(
            f"the saved population has {sorted(saved)}, but neither 'roster' nor "
            "'scale_bits': save all of flax.serialization.to_state_dict(population)"
        )
    statics = {}
    for path, bits in saved["scale_bits"].items():
        scales = np.ascontiguousarray(bits).view(np.float64)[:, 0]
        statics[path] = _statics(scales, saved["pairs"][path]["rank"])
    return _roster(statics)


def _statics(scale: Iterable[Any], rank: Iterable[Any]) -> tuple[PairStatics, ...]:
    """Every member's statics, as Python numbers."""
    both = zip(map(float, scale), map(int, rank), strict=True)
    return tuple(PairStatics(*own) for own in both)


def _roster(statics: Mapping[str, tuple[PairStatics, ...]]) -> Roster:
    return Roster(tuple(statics), tuple(statics.values()))


def enrol(
    members: Sequence[Adapters],
) -> tuple[Adapters, dict[str, PairStatics], Roster]:
    """Returns adapters with leaves `[K, ...]`, and the statics in which they differ.

    Args:
      members: at least one adapter tree, all for the same parameter tree.

    Returns:
      The stacked adapters, with narrower factors padded with zeros to the widest and
      static fields from the first member; `PairStatics` of arrays `[K]` for the paths
      where scales or ranks differ; and the same as a roster.

    Raises:
      ValueError: members differ in anything else; the message names path and field.
    """
    _require_paths(members)
    stacked: Adapters = {}
    pairs: dict[str, PairStatics] = {}
    statics: dict[str, tuple[PairStatics, ...]] = {}
    for path in members[0]:
        own: list[Any] = [adapters[path] for adapters in members]
        for k, adapter in enumerate(own):
            _require_alike(path, k, adapter, own[0])
        if differing := _differing(own):
            scales, widths = zip(*differing, strict=True)
            dtype = layout.wide(*jax.tree.leaves(own[0]))
            statics[path] = differing
            pairs[path] = PairStatics(
                jnp.array(scales, dtype), jnp.array(widths, jnp.int32)
            )
            if len({*widths}) > 1:
                own = [ranks.padded(a, max(widths)) for a in own]
            own = [a.replace(scale=scales[0]) for a in own]  # one treedef
        stacked[path] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)
    return stacked, pairs, _roster(statics)


def _require_paths(members: Sequence[Adapters]) -> None:
    for k, adapters in enumerate(members):
        if paths := sorted(members[0].keys() ^ adapters.keys()):
            has, lacks = (k, 0) if paths[0] in adapters else (0, k)
            raise ValueError(
                f"{paths[0]}: member {has} has an adapter there, but member {lacks} "
                "has none; members must adapt the same leaves"
            )


def _differing(members: Sequence[Any]) -> tuple[PairStatics, ...]:
    """The members' scales and ranks; () if they are equal or the class has no scale."""
    if not hasattr(members[0], "scale"):
        return ()
    widths = [getattr(adapter, "rank", 1) for adapter in members]  # 1 if without rank
    found = _statics([adapter.scale for adapter in members], widths)
    return found if len({*found}) > 1 else ()


def _require_alike(path: str, k: int, adapter: Any, first: Any) -> None:
    """Raises ValueError naming the first field that keeps two members from stacking.

    Shapes, up to the rank, were checked against the leaf by `transform.check`.
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
                f"{path}: member {k} has {name}={new!r}, but member 0 has {old!r}; "
                "members of a population may only differ in key, rank (except "
                "AdaLora), scale and hyperparameters: train this one in another "
                "population"
            )
