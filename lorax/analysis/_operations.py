"""Counts the operations of a traced program, with loop bodies times their trip count.

XLA's own count (`cost_analysis`) counts a loop's body once, and a stack of layers is a
loop.
"""

from __future__ import annotations

import math
from typing import Any


def operations(jaxpr: Any) -> int:
    """Returns the operations of all matrix products and convolutions.

    A multiplication and an addition count as two. The body of a `while` loop, whose
    trip count is unknown, counts once; a `cond` counts as its most expensive branch. A
    `shard_map`'s body counts on every device along its axes, and the rest of a program
    once, however it is sharded: the sum is over all devices. A `ragged_dot` counts
    every row, whatever its groups.

    Args:
      jaxpr: `jax.jit(f).trace(*args).jaxpr`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> f = lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, None, length=3)[0]
      >>> operations(jax.jit(f).trace(jnp.ones((4, 4))).jaxpr)
      384
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_equation(eqn) for eqn in jaxpr.eqns)


def _equation(eqn: Any) -> int:
    name = eqn.primitive.name
    if name == "dot_general":
        (read, _), _ = eqn.params["dimension_numbers"]
        inner = math.prod(eqn.invars[0].aval.shape[d] for d in read)
        return 2 * inner * math.prod(eqn.outvars[0].aval.shape)
    if name == "ragged_dot_general":
        return _ragged(eqn)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        out = eqn.params["dimension_numbers"].rhs_spec[0]
        return (
            2
            * math.prod(eqn.outvars[0].aval.shape)
            * (math.prod(kernel) // kernel[out])
        )
    inside = [
        operations(item)
        for value in eqn.params.values()
        for item in (value if isinstance(value, tuple | list) else [value])
        if hasattr(item, "eqns") or hasattr(item, "jaxpr")
    ]
    if name == "cond":
        return max(inside, default=0)
    return sum(inside) * _times(eqn)


def _ragged(eqn: Any) -> int:
    """Each row uses the kernel of one group, or enters the sum of one group."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (read, _), _ = numbers.dot_dimension_numbers
    inner = math.prod(eqn.invars[0].aval.shape[d] for d in read)
    out = eqn.outvars[0].aval.shape
    summed = {*numbers.lhs_ragged_dimensions} <= {*read}  # `out` has the groups first
    return 2 * inner * math.prod(out[1:] if summed else out)


def _times(eqn: Any) -> int:
    """How often the bodies of an equation run, summed over all devices."""
    if eqn.primitive.name == "scan":
        return eqn.params["length"]
    if eqn.primitive.name == "shard_map":
        sizes = eqn.params["mesh"].shape
        return math.prod(sizes[axis] for axis in eqn.params["newly_manual_axes"])
    return 1
