"""The base model as PEFT sees it: modules by name, and their leaves here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from lorax.interop import hf
from lorax.models import table

WEIGHT = ".weight"


class Base:
    """The names and shapes of one model; nothing is allocated.

    Args:
      config: a config from one of the families in `lorax.models`.

    Attributes:
      where: `{key on disk: Location}`.
      shapes: abstract leaves by path.
      words: name of the module that looks up tokens.
      embedding: name of the module whose matrix the head shares, or "".
      head: name of that tied head, which has no leaf of its own, or "".
      shared: modules that torch has several times, in encoder and decoder.
      older: `(older name, present name)` of modules that transformers has renamed.
    """

    def __init__(self, config: Any) -> None:
        """Reads the family's table."""
        family = hf.family_of(config.to_hf(), "config")
        # for experts, the names of transformers' modules, not those in a checkpoint
        entries = getattr(family, "fused", family.entries)

        def locate(config: Any) -> dict[str, table.Location]:
            return table.locate(entries(config), config.stacks, config.scan)

        self.where = locate(config)
        shapes = hf.abstract(family.Model(config))
        self.shapes = flax.traverse_util.flatten_dict(shapes, sep="/")
        words = [k for k, v in self.where.items() if v.entry.axes == ("vocab", "embed")]
        self.words = word = words[0].removesuffix(WEIGHT) if words else ""
        self.head = _tied_head(config, self.where, locate)
        self.embedding = word if self.head else ""
        self.shared = {word} if getattr(family, "INPUTS", 1) > 1 else set()
        self.older: tuple[tuple[str, str], ...] = getattr(family, "OLDER_MODULES", ())

    @property
    def modules(self) -> dict[str, table.Location]:
        """The modules that can have factors, by name; a tied head shares one."""
        found = {
            key.removesuffix(WEIGHT): location
            for key, location in self.where.items()
            if location.entry.inputs and key.endswith(WEIGHT)
            if location.entry.order is None
        }
        if self.head:
            found[self.head] = found[self.embedding]
        return found

    @property
    def parameters(self) -> dict[str, table.Location]:
        """The kernels of all experts of a layer, by the names of the parameters."""
        held = {key: place for key, place in self.where.items() if place.entry.order}
        return {
            k: place for k, place in held.items() if place.entry.axes[0] == "experts"
        }

    def require_one(self, module: str) -> None:
        """Raises ValueError for a module that torch has several times."""
        if module in self.shared:
            raise ValueError(
                f"{module!r} is an embedding that encoder, decoder and head share: in "
                "torch these are separate modules, and PEFT has no adapter for all"
            )

    def require_matrix(self, module: str) -> None:
        """Raises ValueError for a convolution, whose factors have spatial axes."""
        place = self.where.get(module + WEIGHT)
        if place is not None and place.entry.order is not None:
            raise ValueError(
                f"{module!r} is not a matrix: PEFT's factors for convolutions are "
                "neither read nor written here; leave it out, for example with "
                f"Target(..., exclude={place.path!r})"
            )

    def is_embedding(self, module: str) -> bool:
        """True for a lookup table; False for a linear map."""
        path = self.modules[module].path
        return path.endswith("/embedding") and module != self.head

    def sizes(self, module: str) -> tuple[int, int]:
        """The numbers of inputs and outputs of a module."""
        place = self.modules[module]
        shape, inputs = place.own(self.shapes[place.path].shape), place.entry.inputs
        sizes = math.prod(shape[:inputs]), math.prod(shape[inputs:])
        return sizes[::-1] if module == self.head else sizes

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape on disk of a parameter."""
        place = self.where[key]
        return table.disk_shape(place.own(self.shapes[place.path].shape), place.entry)

    def matrix(self, module: str) -> str:
        """The key of a module's matrix; for a tied head, that of its embedding."""
        return (self.embedding if module == self.head else module) + WEIGHT

    def tensor(self, key: str, leaves: Mapping[str, Any]) -> np.ndarray:
        """Returns a parameter in its form on disk, given the leaves by path."""
        place = self.where[key]
        part = np.asarray(leaves[place.path][place.part])
        return np.ascontiguousarray(table.to_disk(part, place.entry))


def _tied_head(
    config: Any, where: Mapping[str, table.Location], locate: Callable[[Any], Any]
) -> str:
    """The torch module that shares the word embedding, or ""."""
    if getattr(config, "tied", False):
        untied = locate(dataclasses.replace(config, tied=False))
        return min(untied.keys() - where.keys()).removesuffix(WEIGHT)
    if getattr(config, "head", "") == "mlm":
        head = {"roberta": "lm_head", "bert": "cls.predictions"}[config.family]
        return f"{head}.decoder"
    return ""


def short_names(chosen: Collection[str], others: Collection[str]) -> list[str]:
    """Returns the shortest ends of names that match `chosen` and none of `others`.

    Example:
      >>> short_names(["h.0.q", "h.1.q", "h.0.v"], ["h.1.v"])
      ['0.v', 'q']
    """
    found: set[str] = set()
    for name in chosen:
        parts = name.split(".")
        ends = [".".join(parts[i:]) for i in reversed(range(len(parts)))]
        found.add(
            next(
                (e for e in ends if not any(o.endswith(e) for o in others)),
                name,
            )
        )
    return sorted(found)
