"""The one jaxpr walker: runs a program in which some values are views of kernels.

Equations that meet no such value are run as they are. The others go to the rule of
their primitive (`rules`: linear operations, `views`, `control`: higher-order ones); a
rule returns None where it does not apply, and then the kernel is merged at that place,
which is always correct. A `Visitor` decides what a linear operation and a merge mean:
`discover` writes them down, `adapt` emits the low-rank branch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
from jax.extend import core
from jax.extend import source_info_util as source

from lorax import _explicit
from lorax.interpret.rescale import Pending
from lorax.interpret.tracked import Rigid, Tracked, followed
from lorax.interpret.use import Use

Rule = Callable[["Walker", Any, list[Any]], Sequence[Any] | None]
RULES: dict[str, Rule] = {}


def rule(*primitives: str) -> Callable[[Rule], Rule]:
    """Registers a rule for primitives, by name."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(primitives, function))
        return function

    return register


class Visitor(Protocol):
    """What the walker reports to, and asks for the value of a linear operation."""

    def linear(self, walker: Walker, use: Use) -> Sequence[Any] | None:
        """Returns the results of a linear use of a kernel, or None to merge it."""

    def merge(self, walker: Walker, eqn: Any, view: Tracked) -> jax.Array:
        """Returns the dense value of a view that meets no rule."""

    def custom(self, walker: Walker, eqn: Any, paths: tuple[str, ...]) -> bool:
        """True to follow kernels into a function with a derivative rule of its own."""

    def branches(self, walker: Walker, use: Use) -> Any | None:
        """Returns what is added to a linear use in there, or None to merge it."""


class Walker:
    """Evaluates one jaxpr; control flow makes an inner walker for each body."""

    def __init__(
        self,
        visitor: Visitor,
        key: jax.Array | None = None,
        scope: tuple[int, ...] = (),
        trips: int = 1,
        caller: str = "",
    ) -> None:
        """Starts a walk.

        Args:
          visitor: decides what linear operations and merges mean.
          key: dropout key of this scope; None switches dropout off.
          scope: the equations that enclose this one, by identity.
          trips: how often the body runs, for counting FLOPs.
          caller: the line that leads here, for equations without one of their own.
        """
        self.visitor, self.key = visitor, key
        self.scope, self.trips, self.caller = scope, trips, caller
        self.scalars: dict[int, Any] = {}
        self.spread: dict[int, Any] = {}  # biases, before they are broadcast
        self.uses = 0
        self.jaxpr: Any = None
        self.readers: dict[int, list[str]] = {}

    def inner(self, eqn: Any, key: jax.Array | None, trips: int = 1) -> Walker:
        """Returns the walker of a body of `eqn`, which runs `trips` times."""
        scope = (*self.scope, id(eqn))
        return Walker(self.visitor, key, scope, self.trips * trips, self.line(eqn))

    def line(self, eqn: Any) -> str:
        """Returns `file:line (function)` of an equation, or of what called it."""
        return source.summarize(eqn.source_info) or self.caller

    def fork_key(self) -> jax.Array | None:
        """Returns a dropout key for one use or one body, different at every call."""
        self.uses += 1
        return None if self.key is None else jax.random.fold_in(self.key, self.uses)

    def run(self, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
        """Evaluates a jaxpr, open or closed, on arrays and `Tracked` views."""
        consts = getattr(jaxpr, "consts", ())
        self.jaxpr = jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        for eqn in jaxpr.eqns:
            for v in eqn.invars:
                self.readers.setdefault(id(v), []).append(eqn.primitive.name)
        for v in jaxpr.outvars:
            self.readers.setdefault(id(v), []).append("return")
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        read = lambda v: v.val if isinstance(v, core.Literal) else env[v]
        for eqn in jaxpr.eqns:
            values = [read(v) for v in eqn.invars]
            results = self.step(eqn, values)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def step(self, eqn: Any, values: list[Any]) -> Sequence[Any]:
        """Evaluates one equation."""
        name = eqn.primitive.name
        if not any(isinstance(value, Tracked | Pending) for value in values):
            return self.plain(eqn, values)
        views = [v.value for v in values if isinstance(v, Tracked)]
        with located(eqn), _explicit.under(*views):
            try:
                results = RULES[name](self, eqn, values) if name in RULES else None
            except Rigid:
                results = None
            if results is None:
                values = [self.merged(value, eqn) for value in values]
                return self.plain(eqn, values)
            return [followed(r) if isinstance(r, Tracked) else r for r in results]

    def plain(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """Runs an equation on arrays; what is broadcast is remembered as it was."""
        if eqn.primitive.name == "broadcast_in_dim":
            if eqn.invars[0].aval.shape == ():
                self.scalars[id(eqn.outvars[0])] = values[0]
            if eqn.invars[0].aval.size < eqn.outvars[0].aval.size:
                self.spread[id(eqn.outvars[0])] = _unbroadcast(eqn, values[0])
        return self.bind(eqn, values)

    def feeds_only_an_add(self, eqn: Any) -> bool:
        """True when the result of an equation has one reader, and that is an add."""
        return self.readers.get(id(eqn.outvars[0])) == ["add"]

    def merged(self, value: Any, eqn: Any) -> Any:
        """Returns the dense value of a view; anything else passes."""
        if not isinstance(value, Tracked):
            return value
        return self.visitor.merge(self, eqn, value)

    def bind(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """Runs one equation on arrays as it is, custom rules and effects included."""
        pairs = zip(eqn.invars, values, strict=True)
        given = {v: value for v, value in pairs if not isinstance(v, core.Literal)}
        info = self.jaxpr.debug_info._replace(
            arg_names=("",) * len(given), result_paths=("",) * len(eqn.outvars)
        )
        single = self.jaxpr.replace(
            constvars=[],
            invars=list(given),
            outvars=list(eqn.outvars),
            eqns=[eqn],
            effects=eqn.effects,
            debug_info=info,
        )
        return core.jaxpr_as_fun(core.ClosedJaxpr(single, []))(*given.values())


def _unbroadcast(eqn: Any, value: jax.Array) -> jax.Array:
    """The operand of a broadcast, with ones for the dimensions that it adds."""
    shape = [1] * len(eqn.params["shape"])
    for dim, size in zip(eqn.params["broadcast_dimensions"], value.shape, strict=True):
        shape[dim] = size
    return value.reshape(shape)


def located(eqn: Any) -> Any:
    """A context in which emitted operations carry the equation's name and line."""
    info = eqn.source_info
    stack = source.current_name_stack() + info.name_stack
    return source.user_context(info.traceback, name_stack=stack)
