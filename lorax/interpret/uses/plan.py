"""What a walk has to know of kernels that the program computes of its parameters."""

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
      leaves: by path, the leaves that the program makes the kernel of.
      refused: by path, why no factors can go beside the kernel.
      roots: by equation, which of its results are kernels, and their paths.
      decoding: equations that lead there; they run where the kernel is read.
      inside: equations with any of these in their bodies.
      cuts: by scan, the paths of which every step has a kernel of its own.
      scaled: linear operations that a scale follows which is a part of the kernel.
      behind: paths of kernels of which the scale follows the product.
      scales: the equations up to that scale; True for the scale itself.
      terms: by path, what goes beside the kernel; in a scan that cuts it, beside the
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
        """Returns the plan of one step of a loop that cuts some terms."""
        return dataclasses.replace(self, terms={**self.terms, **own})


NOTHING = Plan()
