"""Sums over chunks, `lorax._sweep`: rebuilt around a step with the branches.

The backward pass of a branch is linear in its cotangent, so the factors' gradients can
be computed in the sweep too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from lorax import _sweep
from lorax.interpret.terms.coded import Coded
from lorax.interpret.terms.tracked import Tracked
from lorax.interpret.uses.equations import aval, called, opened, scan_layout
from lorax.interpret.walker import Value, Values, Walker


class Sweep(NamedTuple):
    """The loop of `_sweep.swept`, as it appears in a program.

    Attributes:
      loop: the scan.
      shared: for each constant of the scan, which operand of the equation it is.
      chunks: likewise for what the scan slices.
    """

    loop: JaxprEqn
    shared: tuple[int, ...]
    chunks: tuple[int, ...]


def read(eqn: JaxprEqn) -> Sweep | None:
    """Returns the loop of an equation that is a sweep; None for any other."""
    body = opened(called(eqn))
    loops = [e for e in body.eqns if e.primitive.name == "scan" and _is_sweep(e)]
    if not loops:
        return None
    (loop,) = loops
    places: dict[Any, int] = {v: i for i, v in enumerate(body.invars)}
    n, carried, _ = scan_layout(loop)
    ends = loop.invars[:n], loop.invars[n + carried :]
    shared, chunks = (tuple(places[v] for v in given) for given in ends)
    return Sweep(loop, shared, chunks)


def _is_sweep(loop: JaxprEqn) -> bool:
    body = opened(loop.params["jaxpr"])
    return any(eqn.params.get("name") == _sweep.NAME for eqn in body.eqns)


def sweep(walker: Walker, eqn: JaxprEqn, found: Sweep, values: Values) -> Values:
    """Returns the sums of a sweep that has kernels among its operands."""
    key = walker.fork_key()
    if not walker.visitor.derives:
        return walker.inner(eqn, key).run(called(eqn), values)
    loop, length = found.loop, found.loop.params["length"]
    shared = [_dense_once(values[i]) for i in found.shared]
    chunks = [values[i] for i in found.chunks]
    steps = None if key is None else jnp.arange(length)

    def step(shared: Any, chunk: Any) -> list[jax.Array]:
        (key, consts), (number, xs) = shared, chunk
        key = None if key is None else jax.random.fold_in(key, number)
        sums = [jnp.zeros(aval(v).shape, aval(v).dtype) for v in loop.outvars]
        outer = walker.inner(eqn, None)
        inner = outer.inner(loop, key, length)
        outs = inner.run(loop.params["jaxpr"], [*consts, *sums, *xs])
        return [outer.merged(out, loop) for out in outs]

    return _sweep.swept(step, (key, shared), (steps, chunks))


def _dense_once(value: Value) -> Value:
    """Decodes a quantised kernel before the loop: no backward pass would keep it."""
    if not isinstance(value, Tracked) or not isinstance(value.value, Coded):
        return value
    leaf = value.value.leaf
    if leaf is not None and leaf.activations:
        return value  # its integers are multiplied as they are
    return Tracked(value.array, value.terms)
