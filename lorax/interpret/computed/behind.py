"""The scale that follows a product with codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.extend import core

from lorax.interpret.computed.made import Made

FOLLOWED = (
    "convert_element_type transpose reshape broadcast_in_dim squeeze copy"
).split()
"""What may come between a product and the scale that follows it."""


Env = Mapping[core.Var, Made | None]
Readers = Mapping[core.Var, list[core.JaxprEqn | None]]


def readers_of(jaxpr: core.Jaxpr) -> Readers:
    """The equations that read each variable; None for a result of the whole jaxpr."""
    readers: dict[core.Var, list[core.JaxprEqn | None]] = {}
    each: list[tuple[core.JaxprEqn | None, Sequence[jax.core.Atom]]]
    each = [*((eqn, eqn.invars) for eqn in jaxpr.eqns), (None, jaxpr.outvars)]
    for eqn, atoms in each:
        for atom in atoms:
            if not isinstance(atom, core.Literal):
                readers.setdefault(atom, []).append(eqn)
    return readers


def to_scale(
    eqn: core.JaxprEqn, readers: Readers, env: Env
) -> tuple[list[core.JaxprEqn], list[Made]]:
    """The equations from a product to the last scale right after it, and the scales.

    A scale is made of parameters; a number before it is part of it.
    """
    found: list[core.JaxprEqn] = []
    scales: list[Made] = []
    kept, numbers, var = 0, 0, eqn.outvars[0]
    while len(readers.get(var, ())) == 1:
        (reader,) = readers[var]
        if reader is None or not _goes_on(reader, var):
            break
        found.append(reader)
        if reader.primitive.name in ("mul", "div"):
            others = [v for v in reader.invars if v is not var]
            known = [env.get(v) for v in others if not isinstance(v, core.Literal)]
            if None in known:
                found.pop()
                break
            scales += [value for value in known if value is not None]
            if any(value.leaves for value in scales[numbers:]):
                kept, numbers = len(found), len(scales)
        var = reader.outvars[0]
    return found[:kept], scales[:numbers]


def _goes_on(eqn: core.JaxprEqn, var: core.Var) -> bool:
    """True for operations that a product may go through up to its scale."""
    name = eqn.primitive.name
    if name == "div":
        return eqn.invars[0] is var
    if name == "convert_element_type":
        return jnp.issubdtype(eqn.params["new_dtype"], jnp.floating)
    return name == "mul" or name in FOLLOWED
