"""Which kernels a program computes from its parameters alone, and where.

A model quantised by its own code stores integers or 8-bit floats, and computes a kernel
from them with scales, zero points, tables and reshapes. The adapter of such a leaf is
added to the kernel, as if the kernel were the leaf. The kernel is

    the last result computed from parameters and constants alone, before the views
    (a transpose, a slice, a split into heads) that lead to a linear operation.

If no scale has been applied to the codes by then, the one that follows the product is
part of the kernel, and the branch is added after it: `y = (x @ q) * s + branch(x)`.

A value that the program names by `checkpoint_name` is a kernel of that name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax

from lorax.interpret.computed.flow import Flow
from lorax.interpret.program import Program
from lorax.interpret.uses.plan import Plan


def plan_of(
    program: Program,
    leaves: Mapping[str, Any],
    wanted: Collection[str] | None = None,
) -> Plan:
    """Returns where a program computes kernels.

    Args:
      program: with all leaves of interest as inputs.
      leaves: arrays, shapes and quantised leaves, by path.
      wanted: paths and names; None for all.
    """
    plan = _passed(program, Flow({p: leaves[p] for p in program.paths}, wanted))
    if wanted is not None:
        return plan
    # a name of many values, say for a jax.checkpoint policy, must hide none of them
    common = {p for p in plan.kernels if p in plan.refused and p not in leaves}
    if not common:
        return plan
    found = _passed(
        program, Flow({p: leaves[p] for p in program.paths}, skipped=common)
    )
    return dataclasses.replace(
        found,
        kernels={**found.kernels, **{name: plan.kernels[name] for name in common}},
        leaves={**found.leaves, **{name: plan.leaves[name] for name in common}},
        refused={**found.refused, **{name: plan.refused[name] for name in common}},
    )


def _passed(program: Program, flow: Flow) -> Plan:
    """What a pass over the program finds."""
    own = [
        flow.constant(i) if _is_own(value, program.whole) else None
        for i, value in enumerate(program.jaxpr.consts)
    ]
    given = map(flow.leaf, program.paths)
    rest = [None] * len(program.rest)
    flow.run(program.jaxpr.jaxpr, [*own, *given, *rest], ())
    return flow.plan()


def _is_own(value: jax.Array, whole: bool) -> bool:
    """True for a constant of the program's own, such as a table of codes."""
    return not isinstance(value, jax.core.Tracer) and (whole or not value.shape)
