"""Causal attention tile by tile in plain XLA, and its gradients.

With S the scores of one tile and m, l, o the sums of earlier tiles,

    m' = max(m, max S)    l' = l e^(m - m') + sum e^(S - m')
                          o' = o e^(m - m') + e^(S - m') v
    P  = e^(S - lse)      lse = m + log l    delta = sum do * out
    dS = P (do v^T - delta)
    dv = P^T do           dq = scale dS k    dk = scale dS^T q

Tokens are in stripes: slot s of part i of n is position s n + i of the row. So for any
two parts, only the tiles on and below the diagonal count.

References:
  Dao, FlashAttention-2, arXiv:2307.08691. Brandon et al., Striped attention,
  arXiv:2311.09431.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorax.attention.plain import PRECISION
from lorax.attention.rule import Given, Rule, capped, seen

TILE = 512
"""Most tokens of a tile: its float32 scores are 1 MiB per head.

For the step of docs/results/planner.md the compiler counts 6.1e10 cycles with 512
tokens, 8.8e10 with 256 and 9.6e10 with 1,024.
"""
LEAST = 64
"""Fewest tokens of a tile, unless rows are shorter: small tiles are far too slow."""


class Part(NamedTuple):
    """Queries, or keys and values, of one part of the row.

    Attributes:
      index: int `[]`, of this part.
      parts: number of parts; static.
      segments: int `[batch, time]`, or None.
    """

    index: Any
    parts: int
    segments: jax.Array | None

    def places(self, start: Any, size: int) -> jax.Array:
        """Returns the positions in the row of some of its slots."""
        return (start + jnp.arange(size)) * self.parts + self.index


class Sums(NamedTuple):
    """What the tiles so far add up to.

    Attributes:
      most: greatest score, `[batch, kv_heads, group, time]`.
      total: sum of the exponentials, likewise.
      mixed: weighted sum of values, `[batch, time, kv_heads, group, head_dim]`.
    """

    most: jax.Array
    total: jax.Array
    mixed: jax.Array

    def result(self) -> tuple[jax.Array, jax.Array]:
        """Returns the output and the logarithm of the total."""
        out = self.mixed / self.total.transpose(0, 3, 1, 2)[..., None]
        return out, self.most + jnp.log(self.total)


def empty(q: jax.Array) -> Sums:
    """Returns the sums over no tiles, for q as in `forward`."""
    batch, time, kv_heads, group, _ = q.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)
    flat = batch, kv_heads, group, time
    least = jnp.full(flat, 0.7 * jnp.finfo(wide).min, wide)
    return Sums(least, jnp.zeros(flat, wide), jnp.zeros(q.shape, wide))


def forward(
    q: jax.Array,
    kv: tuple[jax.Array, jax.Array],
    rule: Rule,
    queries: Part,
    keys: Part,
    sums: Sums,
) -> Sums:
    """Adds the keys of one part to the sums.

    Args:
      q: `[batch, time, kv_heads, group, head_dim]`.
      kv: keys and values, `[batch, time, kv_heads, head_dim]`.
      rule: causal.
      queries: the part of the row that q is.
      keys: the part of the row that kv are.
      sums: over other parts so far.
    """
    k, v = kv

    def step(sums: Sums, pair: jax.Array) -> tuple[Sums, None]:
        tile = _Tile(pair, q.shape[1], rule, queries, keys)
        scores, counts, _ = tile.scores(q, k)
        old = Sums(
            *(tile.rows(x, axis) for x, axis in zip(sums, (3, 3, 1), strict=True))
        )
        most = jnp.maximum(old.most, scores.max(-1))
        shrink = jnp.exp(old.most - most)
        weights = jnp.where(counts, jnp.exp(scores - most[..., None]), 0)
        mixed = _dot("bkgts,bskh->btkgh", weights.astype(v.dtype), tile.columns(v))
        new = Sums(
            most,
            old.total * shrink + weights.sum(-1),
            old.mixed * shrink.transpose(0, 3, 1, 2)[..., None] + mixed,
        )
        both = zip(sums, new, (3, 3, 1), strict=True)
        return Sums(*(tile.put_rows(x, y, axis) for x, y, axis in both)), None

    pairs = _pairs(q.shape[1], rule, queries.parts, sums.total)
    return jax.lax.scan(step, sums, pairs)[0]


def backward(
    q: jax.Array,
    kv: tuple[jax.Array, jax.Array],
    rule: Rule,
    queries: Part,
    keys: Part,
    known: tuple[jax.Array, jax.Array, jax.Array],
    slopes: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adds the contribution of one part's keys to the gradients of q, k and v.

    Args:
      q: as in `forward`.
      kv: likewise.
      rule: likewise.
      queries: likewise.
      keys: likewise.
      known: gradient of the output, shaped as q; lse and delta, shaped as `Sums.most`.
      slopes: gradients of q, k and v so far, in a wide dtype.
    """
    k, v = kv
    given, lse, delta = known

    def step(slopes: Any, pair: jax.Array) -> tuple[Any, None]:
        dq, dk, dv = slopes
        tile = _Tile(pair, q.shape[1], rule, queries, keys)
        scores, counts, bend = tile.scores(q, k)
        do = tile.rows(given, 1)
        p = jnp.where(counts, jnp.exp(scores - tile.rows(lse, 3)[..., None]), 0)
        dp = _dot("btkgh,bskh->bkgts", do, tile.columns(v))
        ds = p * (dp - tile.rows(delta, 3)[..., None]) * bend * rule.scale
        p, ds = p.astype(q.dtype), ds.astype(q.dtype)
        dq = tile.add_rows(dq, _dot("bkgts,bskh->btkgh", ds, tile.columns(k)))
        dk = tile.add_columns(dk, _dot("bkgts,btkgh->bskh", ds, tile.rows(q, 1)))
        dv = tile.add_columns(dv, _dot("bkgts,btkgh->bskh", p, do))
        return (dq, dk, dv), None

    pairs = _pairs(q.shape[1], rule, queries.parts, slopes[0])
    return jax.lax.scan(step, slopes, pairs)[0]


def size_of(time: int) -> int:
    """Returns the tokens of a tile: the largest divisor of the time up to TILE."""
    return max(n for n in range(1, min(time, TILE) + 1) if time % n == 0)


def _pairs(time: int, rule: Rule, parts: int, carried: jax.Array) -> jax.Array:
    """The tiles of queries and of keys that see each other, `[pairs, 2]`.

    They nominally depend on what the enclosing loop carries: otherwise `jax.checkpoint`
    moves the slices and masks of all tiles out of that loop and holds them at once.
    """
    size = size_of(time)
    found = []
    for i in range(time // size):
        for j in range(i + 1):
            nearest = ((i - j - 1) * size + 1) * parts - parts + 1
            if rule.window is None or nearest < rule.window:
                found.append((i, j))
    pairs = jnp.array(found, jnp.int32)
    return jax.lax.optimization_barrier((carried.ravel()[0], pairs))[1]


class _Tile:
    """One tile of scores: some of the queries, some of the keys."""

    def __init__(
        self, pair: jax.Array, time: int, rule: Rule, queries: Part, keys: Part
    ) -> None:
        self.size = size_of(time)
        self.row, self.column = pair[0] * self.size, pair[1] * self.size
        self.rule, self.queries, self.keys = rule, queries, keys

    def rows(self, x: jax.Array, axis: int) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, self.row, self.size, axis)

    def columns(self, x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, self.column, self.size, 1)

    def put_rows(self, x: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x, new, self.row, axis)

    def add_rows(self, x: jax.Array, more: jax.Array) -> jax.Array:
        return self.put_rows(x, self.rows(x, 1) + more, 1)

    def add_columns(self, x: jax.Array, more: jax.Array) -> jax.Array:
        new = self.columns(x) + more
        return jax.lax.dynamic_update_slice_in_dim(x, new, self.column, 1)

    def scores(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, ...]:
        """Scores `[batch, kv_heads, group, time, keys]`, their mask, cap slope."""
        rule = self.rule
        scores = rule.scale * _dot(
            "btkgh,bskh->bkgts", self.rows(q, 1), self.columns(k)
        )
        bend = jnp.ones((), scores.dtype)
        if rule.soft_cap is not None:
            scores = capped(scores, rule.soft_cap)
            bend = 1 - (scores / rule.soft_cap) ** 2
        segments = None
        if self.queries.segments is not None and self.keys.segments is not None:
            own = self.rows(self.queries.segments, 1)
            segments = own, self.columns(self.keys.segments)
        places = (
            self.queries.places(self.row, self.size),
            self.keys.places(self.column, self.size),
        )
        counts = seen(rule, Given(segments), *places)
        assert counts is not None  # the rule is causal
        counts = counts[:, :, None]
        least = 0.7 * jnp.finfo(scores.dtype).min
        return jnp.where(counts, scores, least), counts, bend


def _dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """A product that accumulates in float32 or wider."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    precision = PRECISION.get(x.dtype)
    return jnp.einsum(spec, x, y, precision=precision, preferred_element_type=wide)
