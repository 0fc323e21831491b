"""Which kernels come before others on the way to the output: all but the heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
from jax.extend import core

from lorax.interpret.terms.tracked import Scope
from lorax.interpret.uses.equations import Bodies, Body, bodies, opened

Origin = frozenset[str]
"""The nearest kernels that a value comes from."""
NONE: Origin = frozenset()


def not_last(jaxpr: Body, equations: Mapping[Scope, set[str]]) -> set[str]:
    """Returns the kernels whose result some later kernel reads; the rest are heads.

    Args:
      jaxpr: the program.
      equations: the kernels that each place (an equation and those around it) uses.
    """
    flow = _Flow(equations)
    flow.run(opened(jaxpr), [NONE] * len(opened(jaxpr).invars), ())
    return flow.inner


class _Flow:
    """A pass over a program in which every value carries its origin."""

    def __init__(self, equations: Mapping[Scope, set[str]]) -> None:
        self.equations = equations
        self.inner: set[str] = set()

    def run(
        self, jaxpr: core.Jaxpr, given: Sequence[Origin], scope: Scope
    ) -> list[Origin]:
        """Returns the origins of a jaxpr's results."""
        if len(given) != len(jaxpr.invars):  # an unknown calling convention
            given = [NONE.union(*given)] * len(jaxpr.invars)
        known = dict(zip(jaxpr.invars, given, strict=True))

        def read(atom: jax.core.Atom) -> Origin:
            return NONE if isinstance(atom, core.Literal) else known.get(atom, NONE)

        for eqn in jaxpr.eqns:
            outs = self.step(eqn, [read(v) for v in eqn.invars], (*scope, eqn))
            known.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def step(
        self, eqn: core.JaxprEqn, sources: list[Origin], place: Scope
    ) -> list[Origin]:
        """Returns the origins of an equation's results."""
        carried = NONE.union(*sources)
        if paths := self.equations.get(place):
            self.inner.update(carried)
            return [frozenset(paths)] * len(eqn.outvars)
        inside = bodies(eqn)
        if inside.jaxprs:
            return self.enter(eqn, inside, sources[inside.skipped :], place)
        return [carried] * len(eqn.outvars)

    def enter(
        self, eqn: core.JaxprEqn, inside: Bodies, sources: list[Origin], place: Scope
    ) -> list[Origin]:
        """Returns the origins of the results of an equation's bodies."""
        if inside.carried:  # what one iteration hands to the next
            again = self.run(inside.jaxprs[0], sources, place)[: inside.carried]
            for i, more in enumerate(again):
                sources[inside.consts + i] |= more
        results = [self.run(body, sources, place) for body in inside.jaxprs]
        if any(len(result) != len(eqn.outvars) for result in results):
            # a kernel that writes to references returns nothing: all it reads counts
            whole = NONE.union(*sources, *(o for r in results for o in r))
            return [whole] * len(eqn.outvars)
        return [NONE.union(*column) for column in zip(*results, strict=True)]
