"""What can be read off an equation, whatever its primitive."""

from __future__ import annotations

from typing import NamedTuple, cast

import jax
from jax.extend import core

Typed = jax.Array | jax.core.ShapedArray
"""An array, or what is known about one before the program runs."""
Body = core.Jaxpr | core.ClosedJaxpr


def aval(atom: jax.core.Atom) -> jax.core.ShapedArray:
    """Returns the shape, the dtype and the sharding of a variable or a literal."""
    return cast(jax.core.ShapedArray, atom.aval)  # or a reference, which has them too


def opened(body: Body) -> core.Jaxpr:
    """Returns a jaxpr without the constants that it is closed over."""
    return body.jaxpr if isinstance(body, core.ClosedJaxpr) else body


def called(eqn: core.JaxprEqn) -> Body:
    """Returns the one body of an equation that only calls it: jit, remat, a rule."""
    return eqn.params["call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"]


def scan_layout(eqn: core.JaxprEqn) -> tuple[int, int, int]:
    """Returns how many operands of a scan are constants, carried and scanned.

    Read off the shapes (a body sees one dimension less of what is scanned), because
    the parameters that say so differ between versions of JAX.
    """
    body = opened(eqn.params["jaxpr"])
    rank = lambda v: len(aval(v).shape)
    same = lambda outer, inner: rank(outer) == rank(inner)
    kept = sum(map(same, eqn.invars, body.invars))
    carried = sum(map(same, eqn.outvars, body.outvars))
    return kept - carried, carried, len(eqn.invars) - kept


class Bodies(NamedTuple):
    """The jaxprs that an equation runs, and how its operands enter them.

    Attributes:
      jaxprs: each of them gives all results.
      skipped: operands in front of those that the bodies get.
      consts: operands of a body that every step of a loop gets.
      carried: operands after these, which one step passes to the next.
    """

    jaxprs: list[core.Jaxpr]
    skipped: int = 0
    consts: int = 0
    carried: int = 0


def bodies(eqn: core.JaxprEqn) -> Bodies:
    """Returns the bodies of any equation; none for a plain one."""
    name, params = eqn.primitive.name, eqn.params
    if name == "while":
        consts, body = params["body_nconsts"], opened(params["body_jaxpr"])
        return Bodies([body], params["cond_nconsts"], consts, len(eqn.outvars))
    found = list(core.jaxprs_in_params(params))
    if name == "scan":
        return Bodies(found, 0, *scan_layout(eqn)[:2])
    return Bodies(found, skipped=int(name == "cond"))
