"""The one jaxpr walker: runs a program in which some values are views of kernels.

Equations that meet no such value are run as they are. The others go to the rule of
their primitive (`rules`: linear operations, views, higher-order ones); a rule returns
None where it does not apply, and then the kernel is merged at that place, which is
always correct. A `Visitor` decides what a linear operation and a merge mean: `discover`
records them, `adapt` emits the low-rank branch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend import source_info_util as source

from lorax import _explicit
from lorax.interpret.terms import packed
from lorax.interpret.terms.coded import ALIKE, Coded, reading
from lorax.interpret.terms.tracked import Rigid, Scope, Term, Tracked, followed
from lorax.interpret.uses import rescale
from lorax.interpret.uses.equations import Body, aval, opened
from lorax.interpret.uses.plan import NOTHING, Plan
from lorax.interpret.uses.rescale import Pending
from lorax.interpret.uses.use import Use


class Part(NamedTuple):
    """What the adapters add to a value; the value itself belongs to another walk."""

    branch: jax.Array


Value = jax.Array | Tracked | Pending | Part
"""What a variable stands for during a walk."""
Values = Sequence[Value]
Rule = Callable[["Walker", core.JaxprEqn, Values], Values | None]
RULES: dict[str, Rule] = {}


def rule(*primitives: str) -> Callable[[Rule], Rule]:
    """Registers a rule for primitives, by name."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(primitives, function))
        return function

    return register


class Visitor(Protocol):
    """What the walker reports to, and asks for the value of a linear operation.

    Attributes:
      derives: True if backward passes are derivatives of what is emitted, and so
        linear in the cotangents that they start from.
    """

    derives: bool

    def linear(self, walker: Walker, use: Use) -> Values | None:
        """Returns the results of a linear use of a kernel, or None to merge it."""

    def merge(self, walker: Walker, eqn: core.JaxprEqn, view: Tracked) -> jax.Array:
        """Returns the dense value of a view to which no rule applies."""

    def decoded(self, walker: Walker, eqn: core.JaxprEqn, view: Tracked) -> jax.Array:
        """Returns the dense frozen value of a quantised view that is needed whole."""

    def custom(
        self, walker: Walker, eqn: core.JaxprEqn, paths: tuple[str, ...]
    ) -> bool:
        """True to follow kernels into a function with a derivative rule of its own."""

    def branches(self, walker: Walker, use: Use) -> jax.Array | None:
        """Returns what is added to a linear use inside such a function, or None."""


class Walker:
    """Evaluates one jaxpr; control flow makes an inner walker for each body."""

    def __init__(
        self,
        visitor: Visitor,
        key: jax.Array | None = None,
        *,
        scope: Scope = (),
        trips: int = 1,
        caller: str = "",
        plan: Plan = NOTHING,
    ) -> None:
        """Starts a walk.

        Args:
          visitor: decides what linear operations and merges mean.
          key: dropout key of this scope; None switches dropout off.
          scope: the equations that enclose this one.
          trips: how often the body runs, for counting FLOPs.
          caller: the line that leads here, for equations without one of their own.
          plan: where the program computes kernels, and what is added to them.
        """
        self.visitor, self.key, self.plan = visitor, key, plan
        self.scope, self.trips, self.caller = scope, trips, caller
        self.scalars: dict[core.Var, jax.Array] = {}
        self.spread: dict[core.Var, jax.Array] = {}
        self.readers: dict[core.Var, list[str]] = {}
        self.uses = 0

    def inner(
        self,
        eqn: core.JaxprEqn,
        key: jax.Array | None,
        trips: int = 1,
        plan: Plan | None = None,
    ) -> Walker:
        """Returns the walker of a body of `eqn`, which runs `trips` times."""
        return Walker(
            self.visitor,
            key,
            scope=self.place(eqn),
            trips=self.trips * trips,
            caller=self.line(eqn),
            plan=self.plan if plan is None else plan,
        )

    def place(self, eqn: core.JaxprEqn) -> Scope:
        """Returns an equation with those that enclose it."""
        return (*self.scope, eqn)

    def line(self, eqn: core.JaxprEqn) -> str:
        """Returns `file:line (function)` of an equation, or of what called it."""
        return source.summarize(eqn.source_info) or self.caller

    def fork_key(self) -> jax.Array | None:
        """Returns a dropout key for one use or one body, different at every call."""
        self.uses += 1
        return None if self.key is None else jax.random.fold_in(self.key, self.uses)

    def run(self, jaxpr: Body, args: Values) -> list[Value]:
        """Evaluates a jaxpr, open or closed, on arrays and `Tracked` views."""
        consts = jaxpr.consts if isinstance(jaxpr, core.ClosedJaxpr) else ()
        self.jaxpr = jaxpr = opened(jaxpr)
        for eqn in jaxpr.eqns:
            self._note_readers(eqn.invars, eqn.primitive.name)
        self._note_readers(jaxpr.outvars, "return")
        env: dict[core.Var, Value] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        read = lambda atom: atom.val if isinstance(atom, core.Literal) else env[atom]
        for eqn in jaxpr.eqns:
            results = self.step(eqn, [read(atom) for atom in eqn.invars])
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _note_readers(self, atoms: Sequence[jax.core.Atom], name: str) -> None:
        for atom in atoms:
            if not isinstance(atom, core.Literal):
                self.readers.setdefault(atom, []).append(name)

    def step(self, eqn: core.JaxprEqn, values: Values) -> Values:
        """Evaluates one equation."""
        if not self.plan.kernels:
            return self.ruled(eqn, values)
        place = self.place(eqn)
        if place in self.plan.decoding:
            results = self.decoded(eqn, values)
        elif place in self.plan.scales:
            results = self.scaled(eqn, values, last=self.plan.scales[place])
        else:
            results = self.ruled(eqn, values, inside=place in self.plan.inside)
        if place not in self.plan.roots:
            return results
        paths = self.plan.roots[place]
        return [self.beside(paths.get(i), v, eqn) for i, v in enumerate(results)]

    def beside(self, path: str | None, value: Value, eqn: core.JaxprEqn) -> Value:
        """Returns a kernel that the program has computed, with its own term."""
        if path is None:
            return value
        own = self.plan.terms[path]
        others = _terms(value)
        if others and not all(
            t.factors is None or t.factors.adds for t in (own, *others)
        ):
            value, others = self.merged(value, eqn), ()  # a gain would multiply both
        return followed(Tracked(_held(value), (*others, own)))

    def decoded(self, eqn: core.JaxprEqn, values: Values) -> Values:
        """Defers an equation that makes a kernel until the kernel is read."""
        given = [
            self.merged(value, eqn) if _terms(value) else value for value in values
        ]
        return [Tracked(value, ()) for value in self.later(eqn, given)]

    def scaled(self, eqn: core.JaxprEqn, values: Values, last: bool) -> Values:
        """Runs an equation between a product and its scale, the last one included.

        Only the frozen part is scaled: the branch is that of the scaled kernel.
        """
        waiting = next((v for v in values if isinstance(v, Pending)), None)
        if waiting is None:
            return self.ruled(eqn, values)
        base = lambda v: v.base if isinstance(v, Pending) else self.merged(v, eqn)
        (scaled,) = self.bind(eqn, [base(value) for value in values])
        branch, gain = waiting.branch, waiting.gain
        if eqn.primitive.name not in ("mul", "div", "convert_element_type"):
            (branch,) = self.bind(eqn, [branch])
            if gain is not None:
                (gain,) = self.bind(eqn, [jnp.broadcast_to(gain, waiting.base.shape)])
        whole = Pending(scaled, branch, gain)
        return [rescale.total(whole) if last else whole]

    def ruled(self, eqn: core.JaxprEqn, values: Values, inside: bool = False) -> Values:
        """Evaluates an equation by its rule, if kernels meet it or are inside it."""
        name = eqn.primitive.name
        if not inside and not any(
            isinstance(value, Tracked | Pending) for value in values
        ):
            return self.plain(eqn, values)
        views = [v.value for v in values if isinstance(v, Tracked)]
        with located(eqn), _explicit.under(*jax.tree.leaves(views)):
            try:
                results = RULES[name](self, eqn, values) if name in RULES else None
            except Rigid:
                results = None
            if results is None:
                return self.plain(eqn, values)
            return [followed(r) if isinstance(r, Tracked) else r for r in results]

    def plain(self, eqn: core.JaxprEqn, values: Values) -> list[jax.Array]:
        """Runs an equation on arrays, with kernels merged.

        The operand of a broadcast is remembered as it was: a bias, a number.
        """
        arrays = [self.merged(value, eqn) for value in values]
        if eqn.primitive.name == "broadcast_in_dim":
            given, made = aval(eqn.invars[0]), aval(eqn.outvars[0])
            if given.shape == ():
                self.scalars[eqn.outvars[0]] = arrays[0]
            if given.size < made.size:
                self.spread[eqn.outvars[0]] = _unbroadcast(eqn, arrays[0])
        return self.bind(eqn, arrays)

    def scalar(self, atom: jax.core.Atom) -> jax.Array | None:
        """Returns the number that an operand was before it was broadcast, if it was."""
        return None if isinstance(atom, core.Literal) else self.scalars.get(atom)

    def unbroadcast(self, atom: jax.core.Atom) -> jax.Array | None:
        """Returns an operand as it was before its broadcast, at equal rank, or None."""
        return None if isinstance(atom, core.Literal) else self.spread.get(atom)

    def feeds_only_an_add(self, eqn: core.JaxprEqn) -> bool:
        """True when the result of an equation has one reader, and that is an add."""
        return self.readers.get(eqn.outvars[0]) == ["add"]

    def scaled_behind(self, eqn: core.JaxprEqn) -> bool:
        """True if a product is followed by a scale that is part of the kernel."""
        return bool(self.plan.scaled) and self.place(eqn) in self.plan.scaled

    def merged(self, value: Value, eqn: core.JaxprEqn) -> jax.Array:
        """Returns the dense value of a view; an array passes through."""
        if isinstance(value, Tracked):
            return self.visitor.merge(self, eqn, value)
        assert not isinstance(value, Pending | Part), value
        return value

    def frozen(self, eqn: core.JaxprEqn, values: Values) -> list[jax.Array]:
        """Runs one equation on the frozen arrays of the views among its operands.

        A quantised one is decoded once more in the backward pass, which keeps the
        packed arrays and not the kernel.
        """
        # forward and backward pass of a scan are two loops, which CSE cannot join
        looped = any(around.primitive.name == "scan" for around in self.scope)
        run = lambda *arrays: self.bind(eqn, arrays)
        return reading(run, [*map(_held, values)], prevent_cse=not looped)

    def view(self, eqn: core.JaxprEqn, values: Values) -> Sequence[jax.Array | Coded]:
        """Runs an equation whose results are frozen arrays of views.

        Those of a quantised kernel are computed only where they are read.
        """
        given = tuple(_held(value) for value in values)
        if not any(isinstance(value, Coded) for value in given):
            return self.frozen(eqn, values)
        if (moved := packed.views(eqn, given)) is not None:
            return moved
        return self.later(eqn, values, alike=eqn.primitive.name in ALIKE)

    def later(
        self, eqn: core.JaxprEqn, values: Values, alike: bool = False
    ) -> list[Coded]:
        """Returns an equation's results as `Coded`s, each computed where it is read."""
        given = tuple(_held(value) for value in values)
        return [
            Coded(
                given,
                lambda *arrays, i=i: self.bind(eqn, arrays)[i],
                aval(out).shape,
                aval(out).dtype,
                alike,
            )
            for i, out in enumerate(eqn.outvars)
        ]

    def bind(self, eqn: core.JaxprEqn, values: Sequence[jax.Array]) -> list[jax.Array]:
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


def frozen(value: Value) -> jax.Array:
    """Returns the frozen array of a view; an array passes through."""
    assert not isinstance(value, Pending | Part), value
    return value.array if isinstance(value, Tracked) else value


def _held(value: Value) -> jax.Array | Coded:
    """What holds the frozen array of a view; an array passes through."""
    assert not isinstance(value, Pending | Part), value
    return value.value if isinstance(value, Tracked) else value


def _terms(value: Value) -> tuple[Term, ...]:
    """What adapters add to a value that is a view."""
    return value.terms if isinstance(value, Tracked) else ()


def known(value: Value) -> Tracked:
    """Returns a value that must be a view."""
    assert isinstance(value, Tracked), value
    return value


def _unbroadcast(eqn: core.JaxprEqn, value: jax.Array) -> jax.Array:
    """The operand of a broadcast, with ones for the dimensions that it adds."""
    shape = [1] * len(eqn.params["shape"])
    for dim, size in zip(eqn.params["broadcast_dimensions"], value.shape, strict=True):
        shape[dim] = size
    return value.reshape(shape)


def located(eqn: core.JaxprEqn) -> AbstractContextManager[None]:
    """A context in which emitted operations carry the equation's name and line."""
    info = eqn.source_info
    stack = source.current_name_stack() + info.name_stack
    return source.user_context(info.traceback, name_stack=stack)
