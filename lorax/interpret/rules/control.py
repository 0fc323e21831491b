"""Higher-order primitives: entered, and rebuilt with their parameters.

A `Tracked` view is a pytree, so it passes through `jax.jit`, `lax.scan` and the rest
like any argument; its factors are sliced, carried and sharded with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn
from jax.sharding import NamedSharding, PartitionSpec

from lorax.interpret.rules import unchanged
from lorax.interpret.terms.coded import Coded
from lorax.interpret.terms.tracked import Rigid, Term, Tracked
from lorax.interpret.uses.equations import called, scan_layout
from lorax.interpret.walker import Value, Values, Walker, frozen, rule
from lorax.types import Factors


@rule("jit", "pjit")
def jit(walker: Walker, eqn: JaxprEqn, values: Values) -> Values:
    """A jitted function: kept under its name, with its sharding constraints."""
    params = eqn.params

    def body(key: jax.Array | None, *args: Value) -> list[Value]:
        given = zip(args, params["in_shardings"], strict=True)
        values = [_constrain(*pair) for pair in given]
        outs = walker.inner(eqn, key).run(params["jaxpr"], values)
        return [_constrain(*p) for p in zip(outs, params["out_shardings"], strict=True)]

    body.__name__ = params["name"]
    return jax.jit(body, inline=params["inline"] is True)(walker.fork_key(), *values)


def _constrain(value: Value, sharding: jax.sharding.Sharding | None) -> Value:
    if not isinstance(sharding, NamedSharding):
        return value
    if isinstance(value, Tracked) and isinstance(value.value, Coded):
        return value  # it is sharded as its packed arrays are
    constrained = jax.lax.with_sharding_constraint(frozen(value), sharding)
    if isinstance(value, Tracked):
        return Tracked(constrained, value.terms)
    return constrained


@rule("closed_call", "core_call")
def call(walker: Walker, eqn: JaxprEqn, values: Values) -> Values:
    """A call that only names a body."""
    return walker.inner(eqn, walker.fork_key()).run(called(eqn), values)


@rule("remat2", "checkpoint")
def remat(walker: Walker, eqn: JaxprEqn, values: Values) -> Values:
    """`jax.checkpoint`, with its policy; the replay draws the same dropout masks."""
    params = eqn.params

    def body(key: jax.Array | None, *args: Value) -> list[Value]:
        return walker.inner(eqn, key).run(params["jaxpr"], args)

    body = jax.checkpoint(
        body, prevent_cse=params["prevent_cse"], policy=params["policy"]
    )
    return body(walker.fork_key(), *values)


@rule("cond")
def cond(walker: Walker, eqn: JaxprEqn, values: Values) -> Values:
    """`lax.cond` and `lax.switch`; a branch that alters a kernel merges it."""
    index, *operands = values
    rest = _Rest(walker, eqn, values)

    def branch(jaxpr: ClosedJaxpr) -> Callable[..., list[jax.Array]]:
        def body(key: jax.Array | None, *args: Value) -> list[jax.Array]:
            return rest.of(walker.inner(eqn, key).run(jaxpr, args))

        return body

    branches = [branch(jaxpr) for jaxpr in eqn.params["branches"]]
    outs = jax.lax.switch(index, branches, walker.fork_key(), *operands)
    return rest.whole(outs)


_State = tuple[jax.Array, list[jax.Array]]
"""The number of a step, for its dropout key, and what a loop carries."""


@rule("while")
def while_(walker: Walker, eqn: JaxprEqn, values: Values) -> Values:
    """`lax.while_loop`; a kernel carried unchanged is a constant of the loop."""
    params = eqn.params
    test, body = params["cond_jaxpr"], params["body_jaxpr"]
    n, m = params["cond_nconsts"], params["body_nconsts"]
    test_consts, body_consts, carry = values[:n], values[n : n + m], values[n + m :]
    rest = _Rest(walker, eqn, values)
    key = walker.fork_key()

    def run_test(state: _State) -> Value:
        step, moving = state
        inner = walker.inner(eqn, _fold(key, step))
        return inner.run(test, [*test_consts, *rest.whole(moving)])[0]

    def run_body(state: _State) -> _State:
        step, moving = state
        inner = walker.inner(eqn, _fold(key, step))
        outs = rest.of(inner.run(body, [*body_consts, *rest.whole(moving)]))
        return step + (key is not None), outs

    state = jnp.int32(0), rest.of(carry)
    return rest.whole(jax.lax.while_loop(run_test, run_body, state)[1])


@rule("scan")
def scan(walker: Walker, eqn: JaxprEqn, values: Values) -> Values | None:
    """`lax.scan` over layers: a stacked kernel is sliced with its factors."""
    params, body = eqn.params, eqn.params["jaxpr"]
    n, carried, _ = scan_layout(eqn)
    consts, carry, xs = values[:n], values[n : n + carried], values[n + carried :]
    xs = [_cuttable(walker, eqn, x) for x in xs]
    rest = _Rest(walker, eqn, [*consts, *carry, *xs])
    still = [place is not None for place in rest.places[:carried]]
    key = walker.fork_key()
    plan, place = walker.plan, walker.place(eqn)
    cut = {path: plan.terms[path] for path in plan.cuts.get(place, ())}

    def full(moving: list[jax.Array]) -> list[Value]:
        moving = list(moving)
        return [c if s else moving.pop(0) for c, s in zip(carry, still, strict=True)]

    def run(
        moving: list[jax.Array],
        given: tuple[jax.Array | None, list[Value], dict[str, Term]],
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        step, slices = given[0], [_layer(s) for s in given[1]]
        own = plan.step({path: term.drop(0) for path, term in given[2].items()})
        inner = walker.inner(eqn, _fold(key, step), params["length"], own)
        outs = rest.of(inner.run(body, [*consts, *full(moving), *slices]))
        return outs[: still.count(False)], outs[still.count(False) :]

    steps = None if key is None else jnp.arange(params["length"])
    extra = {"_split_transpose": True} if params.get("_split_transpose") else {}
    start = [c for c, s in zip(carry, still, strict=True) if not s]
    moving, ys = jax.lax.scan(
        run,
        [walker.merged(c, eqn) for c in start],
        (steps, xs, cut),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
        **extra,
    )
    return rest.whole([*moving, *ys])


class _Rest:
    """The results of an equation, without the kernels that it returns unchanged."""

    def __init__(self, walker: Walker, eqn: JaxprEqn, values: Values) -> None:
        self.walker, self.eqn, self.values = walker, eqn, values
        self.places = [
            place if place is not None and isinstance(values[place], Tracked) else None
            for place in unchanged.handed_on(eqn)
        ]

    def of(self, outs: Values) -> list[jax.Array]:
        """Returns what a body must return: the other results, merged."""
        given = zip(outs, self.places, strict=True)
        return [self.walker.merged(o, self.eqn) for o, place in given if place is None]

    def whole(self, outs: Values) -> list[Value]:
        """Returns all results, with the outer views in place of the kernels."""
        given = iter(outs)
        return [next(given) if p is None else self.values[p] for p in self.places]


def _fold(key: jax.Array | None, step: jax.Array | None) -> jax.Array | None:
    return None if key is None or step is None else jax.random.fold_in(key, step)


def _cuttable(walker: Walker, eqn: JaxprEqn, value: Value) -> Value:
    """What a scan can slice: a view whose arrays are stacks of kernels, or an array."""
    if not _stacked(value):
        return walker.merged(value, eqn)
    if not isinstance(value, Tracked) or not isinstance(value.value, Coded):
        return value
    if value.value.stacked:
        return value
    whole = walker.visitor.decoded(walker, eqn, value)
    return Tracked(whole, value.terms) if value.terms else whole


def _stacked(value: Value) -> bool:
    """True unless this is a kernel whose leading axis is not a stack of kernels."""
    if not isinstance(value, Tracked):
        return True
    shape = value.value.shape
    return all(
        (term.labels[0] or term.added(0))
        and term.whole(0, shape)
        and (term.factors is None or term.kind(0) == "batch")
        for term in value.terms
    )


def _layer(value: Value) -> Value:
    """Removes the scanned axis from the description of a sliced view."""
    if not isinstance(value, Tracked):
        return value
    frozen = value.value
    frozen = frozen.layer() if isinstance(frozen, Coded) else frozen
    return Tracked(frozen, tuple(t.drop(0) for t in value.terms))


@rule("shard_map")
def shard_map(walker: Walker, eqn: JaxprEqn, values: Values) -> Values | None:
    """`jax.shard_map`: factors are split as the kernel's axes are, but for the rank."""
    params = eqn.params
    if any(
        not term.whole(d, value.value.shape) or term.added(d)
        for value in values
        if isinstance(value, Tracked)
        for term in value.terms
        for d in range(value.value.ndim)
    ):
        return None
    manual = params["newly_manual_axes"]
    shards = 1
    for axis in manual:
        shards *= params["mesh"].shape[axis]

    values = [_divisible(value) for value in values]
    rest = _Rest(walker, eqn, values)

    def body(key: jax.Array | None, *args: Value) -> list[jax.Array]:
        inner = walker.inner(eqn, key, trips=shards)
        return rest.of(inner.run(params["jaxpr"], [_local(arg) for arg in args]))

    specs = [
        _specs(value, spec)
        for value, spec in zip(values, params["in_specs"], strict=True)
    ]
    outs = jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=(PartitionSpec(), *specs),
        out_specs=[
            spec
            for spec, place in zip(params["out_specs"], rest.places, strict=True)
            if place is None
        ],
        axis_names=set(manual),
        check_vma=params["check_vma"],
    )(walker.fork_key(), *values)
    return rest.whole(outs)


def _divisible(value: Value) -> Value:
    """A view whose arrays can be split as its kernel is: packed ones of a leaf can."""
    if not isinstance(value, Tracked) or not isinstance(value.value, Coded):
        return value
    leaf = value.value.leaf
    frozen = value.array if leaf is None else value.value.of_leaf(leaf.unnested())
    return Tracked(frozen, value.terms)


def _specs(value: Value, spec: PartitionSpec) -> PartitionSpec | Tracked:
    """Returns the specs of a view's frozen array and of its factors."""
    if not isinstance(value, Tracked):
        return spec
    dims = [*spec, *[None] * (value.value.ndim - len(spec))]

    def term_specs(term: Term) -> Term:
        if term.factors is None:
            return term
        batch, in_, out = (
            [dims[d] for d in term.dims(kind)] for kind in ("batch", "in", "out")
        )
        cut = {"in": any(in_), "out": any(out)}
        if any(cut[kind] for kind in term.factors.rigid):
            raise Rigid
        # one spec for every array: a view is a tree, and this is its tree of specs
        specs = [
            PartitionSpec(*batch, *in_, None),
            PartitionSpec(*batch, None, *out),
            None if term.factors.gain is None else PartitionSpec(*batch, *out),
            *jax.tree.map(lambda _: PartitionSpec(*batch), term.factors[3:]),
        ]
        return dataclasses.replace(term, factors=Factors(*specs))

    whole: Any = spec
    if isinstance(value.value, Coded):
        whole = value.value.specs(dims)
    return Tracked(whole, tuple(term_specs(term) for term in value.terms))


def _local(value: Value) -> Value:
    """Gives a view inside a shard the shapes of the shard."""
    if not isinstance(value, Tracked):
        return value
    frozen = value.value
    if isinstance(frozen, Coded) and frozen.leaf is not None:
        frozen = frozen.of_leaf(frozen.leaf)
    shape = tuple(frozen.shape)
    terms = (dataclasses.replace(term, shape=shape) for term in value.terms)
    return Tracked(frozen, tuple(terms))
