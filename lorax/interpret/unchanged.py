"""Which results of a body are operands handed on as they are.

A loop or a branch that returns a kernel unchanged (`nnx.scan` and `nnx.remat` return
all of a layer's state) does not use it: the view outside stands for the result, and
nothing is merged, stacked or copied.
"""

from __future__ import annotations

from typing import Any

from jax.extend import core


def sources(body: Any) -> list[int | None]:
    """Returns, for each result of a jaxpr, the operand it is, or None."""
    jaxpr = getattr(body, "jaxpr", body)
    made = {v: (eqn, i) for eqn in jaxpr.eqns for i, v in enumerate(eqn.outvars)}
    places = {v: i for i, v in enumerate(jaxpr.invars)}
    handed: dict[int, list[int | None]] = {}

    def follow(v: Any) -> int | None:
        while not isinstance(v, core.Literal) and v in made:
            eqn, i = made[v]
            if id(eqn) not in handed:
                handed[id(eqn)] = handed_on(eqn)
            place = handed[id(eqn)][i]
            if place is None:
                return None
            v = eqn.invars[place]
        return None if isinstance(v, core.Literal) else places.get(v)

    return [follow(v) for v in jaxpr.outvars]


def handed_on(eqn: Any) -> list[int | None]:
    """Returns, for each result of an equation, the operand it is, or None."""
    name, params = eqn.primitive.name, eqn.params
    if name in ("jit", "pjit", "remat2", "checkpoint"):
        return sources(params["jaxpr"])
    if name in ("closed_call", "core_call"):
        return sources(params.get("call_jaxpr", params.get("jaxpr")))
    if name in ("copy", "name"):
        return [0]
    if name == "optimization_barrier":
        return list(range(len(eqn.outvars)))
    rule = {"cond": _cond, "while": _while, "scan": _scan, "shard_map": _shard_map}
    return rule[name](eqn) if name in rule else [None] * len(eqn.outvars)


def _cond(eqn: Any) -> list[int | None]:
    """What every branch hands on."""
    branches = zip(*map(sources, eqn.params["branches"]), strict=True)
    return [
        i + 1 if (i := found[0]) is not None and len({*found}) == 1 else None
        for found in branches
    ]


def _while(eqn: Any) -> list[int | None]:
    params = eqn.params
    consts, test = params["body_nconsts"], params["cond_nconsts"]
    found = sources(params["body_jaxpr"])
    return [test + i if i == consts + n else None for n, i in enumerate(found)]


def _scan(eqn: Any) -> list[int | None]:
    """A carry in its own place, a scanned operand as a stacked result."""
    consts, carried, _ = scan_layout(eqn)

    def stays(n: int, i: int) -> bool:
        return i == consts + n if n < carried else i >= consts + carried

    found = sources(eqn.params["jaxpr"])
    return [i if i is not None and stays(n, i) else None for n, i in enumerate(found)]


def _shard_map(eqn: Any) -> list[int | None]:
    """What is split and joined alike."""
    into, out = eqn.params["in_specs"], eqn.params["out_specs"]
    found = sources(eqn.params["jaxpr"])
    return [
        i if i is not None and into[i] == out[n] else None for n, i in enumerate(found)
    ]


def scan_layout(eqn: Any) -> tuple[int, int, int]:
    """Returns how many operands of a scan are constants, carried and scanned.

    Read off the shapes (a body sees one dimension less of what is scanned), because
    the parameters that say so differ between versions of JAX.
    """
    body = getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])
    rank = lambda v: len(v.aval.shape)
    same = lambda outer, inner: rank(outer) == rank(inner)
    kept = sum(map(same, eqn.invars, body.invars))
    carried = sum(map(same, eqn.outvars, body.outvars))
    return kept - carried, carried, len(eqn.invars) - kept
