"""Higher-order primitives: entered, and built again with their parameters.

A `Tracked` view is a pytree, so it passes through `jax.jit`, `lax.scan` and the rest
like any argument; its factors are sliced, carried and sharded with it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lorax.interpret import unchanged
from lorax.interpret.tracked import Rigid, Term, Tracked
from lorax.interpret.walker import Walker, rule
from lorax.types import Factors


@rule("jit", "pjit")
def jit(walker: Walker, eqn: Any, values: list[Any]) -> list[Any]:
    """A jitted function: kept under its name, with its sharding constraints."""
    params = eqn.params

    def body(key: Any, *args: Any) -> list[Any]:
        given = zip(args, params["in_shardings"], strict=True)
        values = [_constrain(*pair) for pair in given]
        outs = walker.inner(eqn, key).run(params["jaxpr"], values)
        return [_constrain(*p) for p in zip(outs, params["out_shardings"], strict=True)]

    body.__name__ = params["name"]
    return jax.jit(body, inline=params["inline"] is True)(walker.fork_key(), *values)


def _constrain(value: Any, sharding: Any) -> Any:
    if not isinstance(sharding, NamedSharding):
        return value
    constrain = lambda x: jax.lax.with_sharding_constraint(x, sharding)
    if isinstance(value, Tracked):
        return Tracked(constrain(value.value), value.terms)
    return constrain(value)


@rule("closed_call", "core_call")
def call(walker: Walker, eqn: Any, values: list[Any]) -> list[Any]:
    """A call that only names a body."""
    jaxpr = eqn.params.get("call_jaxpr", eqn.params.get("jaxpr"))
    return walker.inner(eqn, walker.fork_key()).run(jaxpr, values)


@rule("remat2", "checkpoint")
def remat(walker: Walker, eqn: Any, values: list[Any]) -> list[Any]:
    """`jax.checkpoint`, with its policy; the replay draws the same dropout masks."""
    params = eqn.params

    def body(key: Any, *args: Any) -> list[Any]:
        return walker.inner(eqn, key).run(params["jaxpr"], args)

    body = jax.checkpoint(
        body, prevent_cse=params["prevent_cse"], policy=params["policy"]
    )
    return body(walker.fork_key(), *values)


@rule("cond")
def cond(walker: Walker, eqn: Any, values: list[Any]) -> list[Any]:
    """`lax.cond` and `lax.switch`; a branch that alters a kernel merges it."""
    index, *operands = values
    rest = _Rest(walker, eqn, values)

    def branch(jaxpr: Any) -> Any:
        def body(key: Any, *args: Any) -> list[Any]:
            return rest.of(walker.inner(eqn, key).run(jaxpr, args))

        return body

    branches = [branch(jaxpr) for jaxpr in eqn.params["branches"]]
    outs = jax.lax.switch(index, branches, walker.fork_key(), *operands)
    return rest.whole(outs)


@rule("while")
def while_(walker: Walker, eqn: Any, values: list[Any]) -> list[Any]:
    """`lax.while_loop`; a kernel carried round unchanged is a constant of the loop."""
    params = eqn.params
    test, body = params["cond_jaxpr"], params["body_jaxpr"]
    n, m = params["cond_nconsts"], params["body_nconsts"]
    test_consts, body_consts, carry = values[:n], values[n : n + m], values[n + m :]
    rest = _Rest(walker, eqn, values)
    key = walker.fork_key()

    def run_test(state: Any) -> jax.Array:
        step, moving = state
        inner = walker.inner(eqn, _fold(key, step))
        return inner.run(test, [*test_consts, *rest.whole(moving)])[0]

    def run_body(state: Any) -> Any:
        step, moving = state
        inner = walker.inner(eqn, _fold(key, step))
        outs = rest.of(inner.run(body, [*body_consts, *rest.whole(moving)]))
        return step + (key is not None), outs

    state = jnp.int32(0), rest.of(carry)
    return rest.whole(jax.lax.while_loop(run_test, run_body, state)[1])


@rule("scan")
def scan(walker: Walker, eqn: Any, values: list[Any]) -> list[Any] | None:
    """`lax.scan` over layers: a stacked kernel is sliced with its factors."""
    params, body = eqn.params, eqn.params["jaxpr"]
    n, carried, _ = unchanged.scan_layout(eqn)
    consts, carry, xs = values[:n], values[n : n + carried], values[n + carried :]
    xs = [x if _stacked(x) else walker.merged(x, eqn) for x in xs]
    rest = _Rest(walker, eqn, [*consts, *carry, *xs])
    still = [place is not None for place in rest.places[:carried]]
    key = walker.fork_key()

    def full(moving: list[Any]) -> list[Any]:
        moving = list(moving)
        return [c if s else moving.pop(0) for c, s in zip(carry, still, strict=True)]

    def run(moving: list[Any], slices: Any) -> Any:
        step, slices = slices
        slices = [_layer(s) for s in slices]
        inner = walker.inner(eqn, _fold(key, step), trips=params["length"])
        outs = rest.of(inner.run(body, [*consts, *full(moving), *slices]))
        return outs[: still.count(False)], outs[still.count(False) :]

    steps = None if key is None else jnp.arange(params["length"])
    extra = {"_split_transpose": True} if params.get("_split_transpose") else {}
    start = [c for c, s in zip(carry, still, strict=True) if not s]
    moving, ys = jax.lax.scan(
        run,
        [walker.merged(c, eqn) for c in start],
        (steps, xs),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
        **extra,
    )
    return rest.whole([*moving, *ys])


class _Rest:
    """The results of an equation without the kernels it hands on as they are."""

    def __init__(self, walker: Walker, eqn: Any, values: list[Any]) -> None:
        self.walker, self.eqn, self.values = walker, eqn, values
        self.places = [
            place if place is not None and isinstance(values[place], Tracked) else None
            for place in unchanged.handed_on(eqn)
        ]

    def of(self, outs: list[Any]) -> list[Any]:
        """Returns what a body has to return: the other results, merged."""
        given = zip(outs, self.places, strict=True)
        return [self.walker.merged(o, self.eqn) for o, place in given if place is None]

    def whole(self, outs: list[Any]) -> list[Any]:
        """Returns all results: the kernels are the views outside."""
        outs = list(outs)
        return [outs.pop(0) if p is None else self.values[p] for p in self.places]


def _fold(key: jax.Array | None, step: jax.Array) -> jax.Array | None:
    return None if key is None else jax.random.fold_in(key, step)


def _stacked(value: Any) -> bool:
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


def _layer(value: Any) -> Any:
    """Removes the scanned axis from the description of a sliced view."""
    if not isinstance(value, Tracked):
        return value
    return Tracked(value.value, tuple(t.drop(0) for t in value.terms))


@rule("shard_map")
def shard_map(walker: Walker, eqn: Any, values: list[Any]) -> list[Any] | None:
    """`jax.shard_map`: factors are split as the kernel's axes are, rank unsharded."""
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

    rest = _Rest(walker, eqn, values)

    def body(key: Any, *args: Any) -> list[Any]:
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


def _specs(value: Any, spec: Any) -> Any:
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
        a: Any = PartitionSpec(*batch, *in_, None)
        b: Any = PartitionSpec(*batch, None, *out)
        gain: Any = term.factors.gain
        maps: Any = term.factors[3:]
        if gain is not None:
            gain = PartitionSpec(*batch, *out)
        cut = {"in": any(in_), "out": any(out)}
        if any(cut[kind] for kind in term.factors.rigid):
            raise Rigid
        maps = jax.tree.map(lambda _: PartitionSpec(*batch), maps)
        return dataclasses.replace(term, factors=Factors(a, b, gain, *maps))

    return Tracked(spec, tuple(term_specs(term) for term in value.terms))


def _local(value: Any) -> Any:
    """Gives a view inside a shard the shapes of the shard."""
    if not isinstance(value, Tracked):
        return value
    shape = tuple(value.value.shape)
    terms = (dataclasses.replace(term, shape=shape) for term in value.terms)
    return Tracked(value.value, tuple(terms))
