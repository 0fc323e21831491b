"""Kernels inside a function with a derivative rule of its own.

The rule is written for the dense operand and is kept: the frozen kernel goes through
the function whole, backward pass included. If the function is linear in the kernel, its
body is also followed for the branch alone,

    f(x, W0 + a b) = f(x, W0) + f(x, a b)

and differentiated as it is written. If a body passes the kernel on (a rule for the
kernel's own gradient) or is not linear in it, the kernel is merged.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from lorax.interpret.rules import sweeps
from lorax.interpret.terms.tracked import Rigid, Tracked, followed
from lorax.interpret.uses.equations import aval, called
from lorax.interpret.uses.rescale import Pending
from lorax.interpret.uses.use import Use
from lorax.interpret.walker import RULES, Part, Values, Visitor, Walker, frozen, rule

BODIES = "jit pjit closed_call core_call custom_jvp_call custom_vjp_call".split()
VIEWS = (
    "convert_element_type transpose reshape broadcast_in_dim squeeze slice copy rev "
    "neg mul div dynamic_slice concatenate split stack name sharding_constraint "
    "reshard pvary pcast"
).split()
"""What a body may do to a kernel before its linear operation."""
OPERATIONS = "dot_general conv_general_dilated ragged_dot_general".split()
ALONE = (
    "transpose reshape broadcast_in_dim squeeze slice copy rev neg reduce_sum name "
    "psum sharding_constraint reshard pvary pcast"
).split()
"""What it may do to the result: operations of one operand, linear in it."""


class NotLinear(Exception):
    """The body does more with a kernel than a linear operation."""


class _BranchOnly:
    """A visitor that keeps the branch of a linear operation, not the frozen product.

    Under discover, where there is no branch, it keeps what to report if the whole body
    turns out to be linear.
    """

    derives = False

    def __init__(self, visitor: Visitor) -> None:
        self.visitor = visitor
        self.reports: list[Callable[[], Values | None]] = []

    def linear(self, walker: Walker, use: Use) -> Values:
        if all(term.factors is None for term in use.view.terms):
            if not use.low_rank or None in map(use.axes, use.view.terms):
                raise NotLinear
            report = self.visitor.linear
            self.reports.append(lambda: report(walker, use))
            return walker.frozen(use.eqn, use.operands)
        found = self.branches(walker, use)
        if found is None:
            raise NotLinear
        return [found]

    def branches(self, walker: Walker, use: Use) -> jax.Array | None:
        return self.visitor.branches(walker, use)

    def merge(self, walker: Walker, eqn: JaxprEqn, view: Tracked) -> jax.Array:
        raise NotLinear

    def decoded(self, walker: Walker, eqn: JaxprEqn, view: Tracked) -> jax.Array:
        return self.visitor.decoded(walker, eqn, view)

    def custom(self, walker: Walker, eqn: JaxprEqn, paths: tuple[str, ...]) -> bool:
        return True  # the visitor is asked about the outer rule


class _BranchWalker(Walker):
    """Evaluates a body for what the adapters add to its results."""

    def step(self, eqn: JaxprEqn, values: Values) -> Values:
        name = eqn.primitive.name
        parts = [value for value in values if isinstance(value, Part)]
        views = [value for value in values if isinstance(value, Tracked)]
        if not parts and not views:
            return self.plain(eqn, values)
        if name in BODIES:
            return _body(self, eqn, self.visitor).run(called(eqn), values)
        if parts and views:
            raise NotLinear
        if parts:
            return [Part(_added(self, eqn, values))]
        try:
            known = name in VIEWS + OPERATIONS
            results = RULES[name](self, eqn, values) if known else None
        except Rigid:
            results = None
        if results is None:
            raise NotLinear
        if name in OPERATIONS:
            return [Part(self.merged(results[0], eqn))]
        return [followed(r) if isinstance(r, Tracked) else r for r in results]


def _body(walker: Walker, eqn: JaxprEqn, visitor: Visitor) -> _BranchWalker:
    """Returns the walker of a body for the branch alone."""
    scope, caller = (*walker.scope, eqn), walker.line(eqn)
    key, trips = walker.fork_key(), walker.trips
    return _BranchWalker(visitor, key, scope=scope, trips=trips, caller=caller)


def _added(walker: Walker, eqn: JaxprEqn, values: Values) -> jax.Array:
    """The part of a result that comes from the parts of one operand, or of two."""
    name, shape = eqn.primitive.name, aval(eqn.outvars[0]).shape
    is_part = [isinstance(value, Part) for value in values]
    arrays = [v.branch if isinstance(v, Part) else frozen(v) for v in values]
    if name in ("add", "add_any", "sub"):
        signs = (1, -1 if name == "sub" else 1)
        own = [s * a for s, a, p in zip(signs, arrays, is_part, strict=True) if p]
        return jnp.broadcast_to(sum(own[1:], start=own[0]), shape)
    if sum(is_part) > 1:
        raise NotLinear
    if name == "convert_element_type":
        if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
            raise NotLinear
        return arrays[0]  # cast once, where it is added
    if name == "mul":
        return jnp.multiply(*arrays)
    if name == "div" and is_part[0]:
        return jnp.divide(*arrays)
    if name in ALONE:
        return walker.bind(eqn, arrays)[0]
    if name in ("dot_general", "conv_general_dilated"):
        both = zip(arrays, eqn.invars, strict=True)
        return walker.bind(eqn, [x.astype(aval(v).dtype) for x, v in both])[0]
    raise NotLinear


@rule("custom_jvp_call", "custom_vjp_call")
def custom(walker: Walker, eqn: JaxprEqn, values: Values) -> Values | None:
    """The function on the frozen kernels, plus the branches of a body linear in them.

    The result of a lookup may be kernels of a stack; if the body does not use it as
    such, it is an activation, and the other kernels are tried without it. A sweep of
    our own is entered instead: see `sweeps`.
    """
    if (loop := sweeps.read(eqn)) is not None:
        return sweeps.sweep(walker, eqn, loop, values)
    found = _beside(walker, eqn, values)
    looked_up = [isinstance(v, Tracked) and v.looked_up for v in values]
    if found is None and any(looked_up):
        pairs = zip(values, looked_up, strict=True)
        values = [walker.merged(v, eqn) if rows else v for v, rows in pairs]
        if not any(isinstance(value, Tracked) for value in values):
            return walker.plain(eqn, values)
        found = _beside(walker, eqn, values)
    return found


def _beside(walker: Walker, eqn: JaxprEqn, values: Values) -> Values | None:
    """The function's results with the branches added; None if it is not linear."""
    if any(isinstance(value, Pending) for value in values):
        return None
    if not any(value.terms for value in values if isinstance(value, Tracked)):
        return walker.frozen(eqn, values)
    visitor = _BranchOnly(walker.visitor)
    try:
        parts = _body(walker, eqn, visitor).run(called(eqn), values)
    except NotLinear:
        return None
    views = [value for value in values if isinstance(value, Tracked)]
    paths = tuple(dict.fromkeys(path for view in views for path in view.paths))
    if any(isinstance(part, Tracked) for part in parts):
        return None
    if not walker.visitor.custom(walker, eqn, paths):
        return None
    for report in visitor.reports:
        report()
    outs = walker.frozen(eqn, values)
    return [
        (out + part.branch).astype(out.dtype) if isinstance(part, Part) else out
        for out, part in zip(outs, parts, strict=True)
    ]
