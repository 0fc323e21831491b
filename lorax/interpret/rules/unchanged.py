"""Which results of a body are operands that it returns unchanged.

A loop or a branch that returns a kernel unchanged (`nnx.scan` and `nnx.remat` return
all of a layer's state) does not use it: the view outside stands for the result, and
nothing is merged, stacked or copied.
"""

from __future__ import annotations

import jax
from jax.extend import core
from jax.extend.core import JaxprEqn

from lorax.interpret.uses.equations import Bodies, Body, bodies, opened

FOLLOWED = (
    "jit pjit remat2 checkpoint closed_call core_call cond while scan shard_map"
).split()
"""Primitives whose bodies may return operands unchanged."""


def sources(body: Body) -> list[int | None]:
    """Returns, for each result of a jaxpr, the operand it is, or None."""
    jaxpr = opened(body)
    made = {v: (eqn, i) for eqn in jaxpr.eqns for i, v in enumerate(eqn.outvars)}
    places = {v: i for i, v in enumerate(jaxpr.invars)}
    handed: dict[JaxprEqn, list[int | None]] = {}

    def follow(v: jax.core.Atom) -> int | None:
        while not isinstance(v, core.Literal) and v in made:
            eqn, i = made[v]
            if eqn not in handed:
                handed[eqn] = handed_on(eqn)
            place = handed[eqn][i]
            if place is None:
                return None
            v = eqn.invars[place]
        return None if isinstance(v, core.Literal) else places.get(v)

    return [follow(v) for v in jaxpr.outvars]


def handed_on(eqn: JaxprEqn) -> list[int | None]:
    """Returns, for each result of an equation, the operand it is, or None."""
    name, results = eqn.primitive.name, range(len(eqn.outvars))
    if name in ("copy", "name", "optimization_barrier"):
        return [*results]
    if name not in FOLLOWED:
        return [None] * len(results)
    inside = bodies(eqn)
    found = zip(*map(sources, inside.jaxprs), strict=True)
    return [_operand(eqn, inside, n, {*each}) for n, each in enumerate(found)]


def _operand(
    eqn: JaxprEqn, inside: Bodies, result: int, found: set[int | None]
) -> int | None:
    """The operand that all bodies return as a result; None if they do not.

    A carry has to stay in its own place, a scanned operand becomes a stacked result,
    and a shard_map has to join its results as it splits its operands.
    """
    place = found.pop()
    if place is None or found:
        return None
    consts, carried = inside.consts, inside.carried
    stays = place == consts + result if result < carried else place >= consts + carried
    if eqn.primitive.name == "shard_map":
        into, out = eqn.params["in_specs"], eqn.params["out_specs"]
        stays = into[place] == out[result]
    return inside.skipped + place if stays else None
