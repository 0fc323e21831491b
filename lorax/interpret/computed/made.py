"""What is known about a value that a program makes from parameters alone."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend import source_info_util as source

from lorax.interpret.terms.tracked import Scope
from lorax.interpret.uses.equations import aval

Scale = Literal["needed", "possible", "done"]
"""Whether the codes are scaled: integers need a scale, other numbers may have one."""


VIEWS = (
    "transpose squeeze slice split unstack rev copy copy_p name stop_gradient "
    "sharding_constraint layout_constraint reshard"
).split()
"""What may come between a kernel and a product, besides casts and splits of axes."""
JOINS = "concatenate stack".split()
UNSCALED = (
    "convert_element_type bitcast_convert_type and or xor not shift_left "
    "shift_right_logical shift_right_arithmetic sub add neg rem reshape "
    "broadcast_in_dim pad select_n clamp max min gather dynamic_slice"
).split()
"""What does not scale codes, besides views, joins, and products with constants."""


@dataclasses.dataclass(frozen=True)
class Made:
    """What is known about a value that is made from parameters and constants alone.

    Attributes:
      key: equal for equal values.
      leaves: the leaves that it is made from.
      loops: the scans in which every step has its own value, the outermost first.
      decoding: the equations that make it from codes.
      scale: whether the codes are scaled.
      sites: the kernels that it is, or is a view of.
      is_leaf: True for a leaf and its views.
    """

    key: int
    leaves: frozenset[str] = frozenset()
    loops: tuple[Scope, ...] = ()
    decoding: frozenset[Scope] = frozenset()
    scale: Scale = "done"
    sites: tuple[Site, ...] = ()
    is_leaf: bool = False


class Site(NamedTuple):
    """A value that may be a kernel.

    Attributes:
      path: of the leaf, or its name.
      place: the equation that makes it.
      result: which of its results.
      kind: shape and dtype.
      made: how it is made.
    """

    path: str
    place: Scope
    result: int
    kind: jax.core.ShapedArray
    made: Made


class Product(NamedTuple):
    """A linear operation that reads kernels.

    Attributes:
      eqn: the operation.
      sites: the kernels.
      after: the equations that lead from it to a scale that follows; () without one.
      scale: keys of that scale.
      parts: the leaves that the scale is made from.
    """

    eqn: core.JaxprEqn
    sites: tuple[Site, ...]
    after: tuple[Scope, ...] = ()
    scale: tuple[int, ...] = ()
    parts: frozenset[str] = frozenset()


def is_scaled(site: Site) -> bool:
    """True if the codes are scaled before the product."""
    return site.made.scale == "done"


def line_of(eqn: core.JaxprEqn) -> str:
    """Returns `file:line (function)`."""
    return source.summarize(eqn.source_info)


def is_real(kind: jax.core.ShapedArray) -> bool:
    """True for floats of 16 bits and more."""
    return jnp.issubdtype(kind.dtype, jnp.floating) and kind.dtype.itemsize > 1


def with_sites(
    made: Made,
    paths: Iterable[str],
    place: Scope,
    result: int,
    kind: jax.core.ShapedArray,
) -> Made:
    """A value that may be the kernel of each path."""
    sites = (Site(path, place, result, kind, made) for path in paths)
    return dataclasses.replace(made, sites=tuple(sites))


def stacked(site: Site) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a kernel, with the steps of loops in front."""
    stack = (loop[-1].params["length"] for loop in site.made.loops)
    return jax.ShapeDtypeStruct((*stack, *site.kind.shape), site.kind.dtype)


def is_view(eqn: core.JaxprEqn) -> bool:
    """True for operations between a kernel and a product that decode nothing."""
    name = eqn.primitive.name
    if name in VIEWS:
        return True
    old, new = aval(eqn.invars[0]), aval(eqn.outvars[0])
    if name == "convert_element_type":
        return is_real(old) and is_real(new)
    if name == "broadcast_in_dim":
        return old.size == new.size
    ends = lambda shape: {*itertools.accumulate(shape, operator.mul)} | {1}
    return name == "reshape" and ends(old.shape) <= ends(new.shape)


def scale_of(eqn: core.JaxprEqn, given: Sequence[Made], coded: Sequence[Made]) -> Scale:
    """Whether the codes of a result are scaled."""
    name = eqn.primitive.name
    if not coded:
        return "done"
    if name in ("mul", "div"):
        scales = [v for v in given if v.leaves and v is not coded[0]]
        return "done" if scales else coded[0].scale
    if name == "gather" and not given[0].sites and given[1] in coded:
        table = jnp.issubdtype(aval(eqn.invars[0]).dtype, jnp.floating)
        return "possible" if table else coded[0].scale
    if name not in (*UNSCALED, *VIEWS, *JOINS):
        return "done"
    order: tuple[Scale, ...] = ("needed", "possible", "done")
    return min((value.scale for value in coded), key=order.index)
