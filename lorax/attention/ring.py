"""Causal attention for rows that devices share: keys and values go round in a ring.

Each of the n devices along the mesh axis "context" holds every n-th token, a stripe:
device i has positions i, n + i, 2n + i, ... So all devices have equal work in each of
the n steps, in which a device computes with the keys and values that it holds while it
passes them on. No device ever holds those of the whole row. The backward pass sends the
keys and values round again, together with their gradients.

References:
  Liu et al., Ring attention, arXiv:2310.01889. Brandon et al., Striped attention,
  arXiv:2311.09431.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from lorax.attention import machine, tiles
from lorax.attention.rule import NAME, Given, Rule

AXIS = "context"
"""The mesh axis whose devices share rows."""


def refusal(q: jax.Array, k: jax.Array, rule: Rule, given: Given) -> str | None:
    """Returns why tiles do not support this; None: they do."""
    if not rule.causal or q.shape[1] != k.shape[1]:
        return "it only supports causal self-attention"
    if given.mask is not None or given.bias is not None:
        return "it supports segments, causality and windows, but no mask and no bias"
    if refused := _indivisible(q.shape[1]):
        return refused
    time = q.shape[1] // machine.parts(machine.auto((AXIS,)))
    if tiles.size_of(time) < min(tiles.LEAST, tiles.TILE, time):
        return (
            f"{time} tokens per device do not split into tiles of at least "
            f"{tiles.LEAST}"
        )
    return None


def _indivisible(time: int) -> str | None:
    n = machine.parts(machine.auto((AXIS,)))
    if time % n**2:
        return (
            f"{time} tokens are not a multiple of {n}^2, but {n} devices of the mesh "
            f"axis {AXIS!r} share a row in stripes (data.lengths, sharding.context)"
        )
    return None


def stripe(x: jax.Array) -> jax.Array:
    """Returns `x: [batch, time, ...]` with its tokens in stripes.

    Without a mesh axis "context", returns x itself.

    Raises:
      ValueError: the time is not a multiple of the square of the axis size.
    """
    return _exchanged(x, _to_stripes)


def unstripe(x: jax.Array) -> jax.Array:
    """Undoes `stripe`."""
    return _exchanged(x, _from_stripes)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rule: Rule,
    given: Given,
    striped: bool = False,
) -> jax.Array:
    """Computes the same as `plain.attend`.

    Args:
      q: `[batch, time, heads, head_dim]`.
      k: `[batch, time, kv_heads, head_dim]`.
      v: likewise.
      rule: causal.
      given: at most segments.
      striped: True if the tokens are in stripes already; the result then is too.
    """
    rows, heads, k, v = machine.spread(q, k, v)
    segments = None if given.segments is None else given.segments[0]
    context = machine.auto((AXIS,))

    def own(q: jax.Array, k: jax.Array, v: jax.Array, segments: Any) -> jax.Array:
        if striped or not context:
            return _attend(rule, context, q, k, v, segments)
        q, k, v, segments = jax.tree.map(_to_stripes, (q, k, v, segments))
        return _from_stripes(_attend(rule, context, q, k, v, segments))

    if rows or heads or context:
        spec = PartitionSpec(rows or None, context or None, heads or None)
        own = jax.shard_map(
            own,
            in_specs=(spec, spec, spec, PartitionSpec(rows or None, context or None)),
            out_specs=spec,
            check_vma=False,
        )
    return own(q, k, v, segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    rule: Rule,
    context: tuple[str, ...],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
) -> jax.Array:
    """On one device: `[batch, time, heads, head_dim]` of its own tokens."""
    return _forward(rule, context, q, k, v, segments)[0]


def _forward(
    rule: Rule, context: tuple[str, ...], q: Any, k: Any, v: Any, segments: Any
) -> tuple[jax.Array, Any]:
    grouped, queries = _grouped(q, k), _part(context, 0, segments)

    def add(sums: tiles.Sums, held: Any, turn: Any) -> tiles.Sums:
        keys = _part(context, turn, held[2])
        return tiles.forward(grouped, held[:2], rule, queries, keys, sums)

    def step(carried: Any, turn: jax.Array) -> tuple[Any, None]:
        held, sums = carried  # held is passed on while it is used
        return (_passed_on(context, held), add(sums, held, turn)), None

    begun = (k, v, segments), tiles.empty(grouped)
    last = queries.parts - 1
    (held, sums), _ = jax.lax.scan(step, begun, jnp.arange(last))
    out, lse = add(sums, held, last).result()
    out = out.reshape(q.shape).astype(q.dtype)
    out, lse = (checkpoint_name(x, NAME) for x in (out, lse))
    return out, (q, k, v, segments, out, lse)


def _backward(
    rule: Rule, context: tuple[str, ...], kept: Any, given: jax.Array
) -> tuple[Any, ...]:
    q, k, v, segments, out, lse = kept
    grouped, queries = _grouped(q, k), _part(context, 0, segments)
    given = _grouped(given, k)
    delta = (given.astype(lse.dtype) * _grouped(out, k)).sum(-1).transpose(0, 2, 3, 1)
    zeros = jnp.zeros(k.shape, lse.dtype)

    def add(dq: jax.Array, slopes: Any, held: Any, turn: Any) -> tuple[jax.Array, Any]:
        """Gradients of keys and values come from the device before; that of q stays."""
        keys, known = _part(context, turn, held[2]), (given, lse, delta)
        came, begun = _passed_on(context, slopes), (dq, zeros, zeros)
        dq, *own = tiles.backward(grouped, held[:2], rule, queries, keys, known, begun)
        return dq, jax.tree.map(jnp.add, came, tuple(own))

    def step(carried: Any, turn: jax.Array) -> tuple[Any, None]:
        held, slopes, dq = carried
        dq, slopes = add(dq, slopes, held, turn)
        return (_passed_on(context, held), slopes, dq), None

    begun = (k, v, segments), (zeros, zeros), jnp.zeros(grouped.shape, lse.dtype)
    last = queries.parts - 1
    (held, slopes, dq), _ = jax.lax.scan(step, begun, jnp.arange(last))
    dq, slopes = add(dq, slopes, held, last)
    dk, dv = _passed_on(context, slopes)  # home
    dq = dq.reshape(q.shape)
    return (*(x.astype(q.dtype) for x in (dq, dk, dv)), None)


_attend.defvjp(_forward, _backward)


def _part(context: tuple[str, ...], turn: Any, segments: Any) -> tiles.Part:
    """What a device holds after this many turns: the part of one so far behind it."""
    if not context:
        return tiles.Part(0, 1, segments)
    n = machine.parts(context)
    return tiles.Part((jax.lax.axis_index(AXIS) - turn) % n, n, segments)


def _passed_on(context: tuple[str, ...], held: Any) -> Any:
    """Returns every array from the device before this one."""
    n = machine.parts(context)
    if n == 1:
        return held
    around = [(i, (i + 1) % n) for i in range(n)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, around), held)


def _grouped(x: jax.Array, k: jax.Array) -> jax.Array:
    """`[batch, time, heads, head_dim]` as `[..., kv_heads, group, head_dim]`."""
    return x.reshape(*x.shape[:2], k.shape[2], -1, x.shape[3])


def _to_stripes(x: jax.Array) -> jax.Array:
    """Exchanges a device's contiguous stretch of the row for its stripe."""
    n = machine.parts((AXIS,))
    cut = x.reshape(x.shape[0], -1, n, *x.shape[2:])
    return jax.lax.all_to_all(cut, AXIS, 2, 1, tiled=True).reshape(x.shape)


def _from_stripes(x: jax.Array) -> jax.Array:
    """Undoes `_to_stripes`."""
    return jax.lax.all_to_all(x[:, :, None], AXIS, 1, 2, tiled=True).reshape(x.shape)


def _exchanged(x: jax.Array, change: Any) -> jax.Array:
    if not machine.auto((AXIS,)):
        return x
    if refused := _indivisible(x.shape[1]):
        raise ValueError(f"attention: {refused}")
    rows = machine.cut(machine.ROWS, x.shape[0])
    spec = PartitionSpec(rows or None, AXIS)
    return jax.shard_map(change, in_specs=spec, out_specs=spec, check_vma=False)(x)
