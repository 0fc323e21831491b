"""What a walk has to know about kernels that the program computes from parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from lorax.interpret.terms.tracked import Scope, Term


def _none() -> Any:
    return dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The kernels that are not leaves: made of codes, or named by `checkpoint_name`.

    Attributes:
      kernels: by path, shape and dtype; the steps of loops are stacked in front.
      leaves: by path, the leaves that the program makes the kernel from.
      refused: by path, why the kernel cannot be adapted.
      roots: by equation, which of its results are kernels, and their paths.
      decoding: equations that lead there; they run where the kernel is read.
      inside: equations with any of these in their bodies.
      cuts: by scan, the paths that have a kernel of their own in every step.
      scaled: linear operations followed by a scale that is part of the kernel.
      behind: paths of kernels whose scale follows the product.
      scales: the equations up to that scale; True for the scale itself.
      terms: by path, what is added to the kernel; in a scan that slices it, to the
        kernel of one step.
    """

    kernels: Mapping[str, jax.ShapeDtypeStruct] = _none()
    leaves: Mapping[str, tuple[str, ...]] = _none()
    refused: Mapping[str, str] = _none()
    roots: Mapping[Scope, Mapping[int, str]] = _none()
    decoding: frozenset[Scope] = frozenset()
    inside: frozenset[Scope] = frozenset()
    cuts: Mapping[Scope, tuple[str, ...]] = _none()
    scaled: frozenset[Scope] = frozenset()
    behind: frozenset[str] = frozenset()
    scales: Mapping[Scope, bool] = _none()
    terms: Mapping[str, Term] = _none()

    def step(self, own: Mapping[str, Term]) -> Plan:
        """Returns the plan of one step of a loop that slices some terms."""
        return dataclasses.replace(self, terms={**self.terms, **own})


NOTHING = Plan()
